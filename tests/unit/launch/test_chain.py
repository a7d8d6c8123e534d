"""A chain on this machine: order, markers, going on, stopping where a stage fails. The stage is a user's command."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
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


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_no_stage_outlives_a_killed_launch_and_a_second_launch_is_refused(words, tmp_path, capfd):
    stage = command(f"sh -c 'echo $$ > {tmp_path}/pid; exec sleep 300'")
    first = subprocess.Popen([sys.executable, "-m", "fuserl_megatron.cli", "launch", *words, stage])
    deadline = time.monotonic() + 600
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    assert main(["launch", *words, command("touch second")]) == 2
    assert re.search(rf"run: process {first.pid} on \S+, .*writes there: wait, stop it", capfd.readouterr().err)
    assert alive(pid)
    first.kill()
    first.wait()
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)
    assert main(["launch", *words, command("true")]) == 0


def test_ctrl_c_waits_for_the_stage_and_hands_on_its_code(words, tmp_path):
    """As a terminal sends it: to both. A training saves and ends with 0; this stage ends as it likes."""
    stage = command(f"sh -c 'trap \"exit 9\" INT; touch {tmp_path}/there; while true; do sleep 0.1; done'")
    launcher = [sys.executable, "-m", "fuserl_megatron.cli", "launch", *words, stage]
    run = subprocess.Popen(launcher, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (tmp_path / "there").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    said = run.communicate(timeout=600)[1]
    assert run.returncode == 9 and said == "evaluate ended with exit code 9; the stages after it were not started\n"


@pytest.mark.parametrize("key", ["run.name", "run.results_dir", "cluster.partition", "cluster.account", "cluster.env"])
def test_a_line_break_in_a_name_is_refused(words, tmp_path, capfd, key):
    """It would begin a command of its own in the job script."""
    value = f"X=1\\ntouch {tmp_path}/P\\n#"
    file = tmp_path / "of somebody else.yaml"
    section, name = key.split(".")
    value = f'"{value}"' if name != "env" else f'["{value}"]'
    file.write_text(f"defaults: [config, _self_]\n{section}:\n  {name}: {value}\n")
    more = [word for word in words if not word.startswith(key)]
    assert main(["launch", "--config-name", str(file), "--dry-run", "cluster=slurm", *more, command("true")]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and rf"{key}=X=1\ntouch" in error and "holds a line break" in error


def test_the_dry_run_s_submission_is_what_a_shell_would_take(words, tmp_path, capfd):
    odd = tmp_path / "a $(touch P) 'b"
    more = [word for word in words if not word.startswith("run.results_dir")]
    assert main(["launch", "--dry-run", "cluster=slurm", f'run.results_dir="{odd}"', *more, command("true")]) == 0
    (line,) = re.findall(r"^evaluate=\$\((.*)\)$", capfd.readouterr().out, re.MULTILINE)
    assert shlex.split(line) == ["sbatch", "--parsable", str(odd / "launch" / "evaluate.sbatch")]
