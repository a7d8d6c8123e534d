"""The stages through nemo-run, for real: its LocalExecutor on this machine, its SlurmExecutor on a SLURM cluster.
`make test-nemo` makes an environment that has it."""

import importlib.util
import io
import json
import re
import time

import pytest

from fuserl_megatron.cli import main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nemo_run") is None, reason="nemo-run is not installed: make test-nemo"
)


@pytest.fixture
def words(case, settings, tmp_path, monkeypatch):
    """A chain of two stages and the folder of nemo-run, which it reads once a process."""
    nemo_home = pytest.importorskip("nemo_run.config").get_nemorun_home()
    monkeypatch.setenv("NEMORUN_HOME", nemo_home)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # nemo-run's tunnel hands it to sbatch; pytest forbids reading it
    return [
        "launcher=nemo",
        f"target={case['policy']}",
        f"run.results_dir={tmp_path / 'run'}",
        "stages=[build_sft,fusesft]",
        f"build_sft.inputs=[{case['records']}]",
        "build_sft.reward_temperature=0.05",
        "build_sft.max_length=96",
        *(f"fusesft.{word}" for word in (*settings, "trainer.max_steps=2")),
    ]


def steps(run):
    return [json.loads(line)["step"] for line in (run / "fusesft" / "metrics.jsonl").read_text().splitlines()]


def test_local_executor_runs_the_chain_and_stops_at_a_failure(words, tmp_path, capfd):
    assert main(["launch", *words, f"fusesft.data.path={tmp_path}/run/build_sft/nowhere"]) == 1
    assert "fusesft did not come to its end" in capfd.readouterr().err
    assert (tmp_path / "run" / "launch" / "build_sft.done").is_file()
    assert main(["launch", *words]) == 0
    assert steps(tmp_path / "run") == [1, 2] and (tmp_path / "run" / "fusesft" / "hf" / "model.safetensors").is_file()
    assert main(["launch", *words]) == 0
    assert capfd.readouterr().out.count(": done (") == 3


def submitted(words, tmp_path, *more):
    assert main(["launch", "cluster=slurm", "cluster.account=root", *words, *more]) == 0
    return json.loads((tmp_path / "run" / "launch" / "jobs.json").read_text())


def without_places(text):
    """A job's script with nemo-run's own folder and experiment id taken out, which differ from run to run."""
    text = re.sub(r"\S*/experiments/\w+/\w+_\d+", "PLACE", text)
    return re.sub(r"# Run with: .*", "", text).strip()


def test_slurm_executor_runs_what_the_dry_run_showed(cluster, words, tmp_path, capfd):
    words.append("fusesft.cluster.nodes=2")
    assert main(["launch", "--dry-run", "cluster=slurm", "cluster.account=root", *words]) == 0
    shown = capfd.readouterr().out
    assert not (tmp_path / "run").exists()
    jobs = submitted(words, tmp_path)
    assert list(jobs) == ["build_sft", "fusesft"]
    for name, job in jobs.items():
        (script,) = re.findall(rf"# ---- job of {name}\n(.*?)(?=\n# ---- |\Z)", shown, re.DOTALL)
        script = re.sub(r"\n#SBATCH --dependency=.*", "", script)
        got = re.sub(r"\n#SBATCH --dependency=.*", "", cluster.run("scontrol", "write", "batch_script", job, "-"))
        assert without_places(got) == without_places(script)
    assert [cluster.wait(job) for job in jobs.values()] == ["COMPLETED", "COMPLETED"]
    assert steps(tmp_path / "run") == [1, 2]


def test_usr1_saves_and_queues_the_job_again(cluster, words, tmp_path):
    words += [
        "fusesft.trainer.max_steps=400",
        "fusesft.exp_manager.checkpoint_callback_params.every_n_train_steps=1000",
    ]
    jobs = submitted([w for w in words if not w.endswith("max_steps=2")], tmp_path)
    metrics = tmp_path / "run" / "fusesft" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    cluster.run("scancel", "--signal=USR1", jobs["fusesft"])  # what --signal=USR1@N does before the limit
    assert cluster.wait(jobs["fusesft"], timeout=400) == "COMPLETED"
    shown = cluster.run("scontrol", "-o", "show", "job", jobs["fusesft"])
    assert "Restarts=1" in shown
    assert steps(tmp_path / "run") == list(range(1, 401))


def test_a_failing_stage_cancels_what_waits_for_it(cluster, words, tmp_path):
    (tmp_path / "bad.jsonl").write_text("no record\n")
    jobs = submitted([*words, f"build_sft.inputs=[{tmp_path / 'bad.jsonl'}]"], tmp_path)
    assert [cluster.wait(job) for job in jobs.values()] == ["FAILED", "CANCELLED"]


def test_what_nemo_run_asks_for_is_one_line(words, capfd):
    assert main(["launch", "--dry-run", "cluster=slurm", *words]) == 2
    assert capfd.readouterr().err == (
        "fuserl: error: cluster.account=null: nemo-run's SlurmExecutor needs one; type cluster.account=NAME.\n"
    )
