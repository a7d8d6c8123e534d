"""A chain on this machine: order, markers, going on, stopping where a stage fails. The stage is a user's command."""

import json
from pathlib import Path

import pytest

from fuserl_megatron.cli import main
from fuserl_megatron.launch.slurm import job_script


@pytest.fixture
def words(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return [f"target={tmp_path / 'model'}", f"run.results_dir={tmp_path / 'run'}", "stages=[evaluate]"]


def command(text):
    return f"evaluate.command={json.dumps(text)}"


def test_a_finished_stage_is_not_run_again_and_a_changed_one_is(words, tmp_path, capfd):
    count = command(f"sh -c 'echo {{model}} $SEEN >> {tmp_path}/seen'")
    for _ in range(2):
        assert main(["launch", *words, count, 'cluster.env=["SEEN=yes"]']) == 0
    assert (tmp_path / "seen").read_text() == f"{tmp_path / 'model'} yes\n"
    assert "evaluate: done" in capfd.readouterr().out
    assert main(["launch", *words, command(f"sh -c 'echo again >> {tmp_path}/seen'")]) == 0
    assert (tmp_path / "seen").read_text().endswith("again\n")
    origin = json.loads((tmp_path / "run" / "launch" / "launch.json").read_text())
    assert origin["overrides"][:3] == words and len(origin["commit"] or "0" * 40) >= 40


def test_a_failing_stage_ends_the_chain_with_its_code(words, tmp_path, capfd):
    assert main(["launch", *words, command("sh -c 'exit 7'")]) == 7
    assert "evaluate ended with exit code 7" in capfd.readouterr().err
    assert not list((tmp_path / "run").rglob("*.done"))


def test_a_dry_run_writes_nothing_and_shows_the_command(words, tmp_path, capfd):
    assert main(["launch", "--dry-run", *words, command("sh -c 'exit 7'")]) == 0
    assert capfd.readouterr().out == "# ---- evaluate\nsh -c 'exit 7'\n\n"
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_one_line(words, tmp_path, capfd):
    assert main(["launch", *words, command("true"), f"run.results_dir={tmp_path}/model/config.json/x"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "config.json" in error


def test_what_a_job_gets_from_the_cluster_section(words):
    from fuserl_megatron.launch.pipeline import load_pipeline

    cluster = {
        "partition": "gpu",
        "account": "me",
        "time": "04:00:00",
        "mem": "200G",
        "gpus_per_node": "8",
        "nodes": "2",
        "container": "/image.sqsh",
        "container_mounts": "[/data:/data,/home:/home]",
        "venv": "/venv",
        "setup": "[module load cuda]",
        "sbatch_options": "[--exclusive]",
    }
    options = [f"cluster.{key}={value}" for key, value in cluster.items()]
    pipeline = load_pipeline([*words, "stages=[fusesft]", "fusesft.data.path=d", "cluster=slurm", *options])
    text = job_script(pipeline, pipeline.stages[0])
    for line in ("partition=gpu", "account=me", "time=04:00:00", "mem=200G", "gpus-per-node=8", "nodes=2", "exclusive"):
        assert f"\n#SBATCH --{line}\n" in text
    assert "\n#SBATCH --ntasks-per-node=8\n" in text and "\n#SBATCH --signal=B:USR1@300\n" in text
    assert "\nexport FUSERL_CONTAINER_MOUNTS=/data:/data,/home:/home\n" in text and "\nmodule load cuda\n" in text
    assert text.index("export FUSERL_VENV=/venv\n") < text.index("module load cuda") < text.index("srun ")
    body = Path(__file__).parents[3] / "slurm" / "train.sbatch"
    assert text.endswith(body.read_text().partition("# From here on")[2])
