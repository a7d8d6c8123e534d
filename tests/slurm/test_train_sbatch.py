"""slurm/train.sbatch on a real SLURM: two nodes, preemption in the middle, arrays, mistakes that end as one line."""

import json
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"


def submit(cluster, case, log, options, *settings):
    words = [f"model.path={case['policy']}", f"data.path={case['data']}", *settings]
    return cluster.run("sbatch", "--parsable", f"--output={log}", *options, str(SCRIPT), *words)


def steps_of(results):
    file = Path(results) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def test_preempted_and_requeued_is_bit_equal_to_undisturbed(cluster, case, settings, tmp_path):
    """The settings put the results elsewhere than the script sees: it asks the run whether to queue it again."""
    two_nodes = ["--nodes=2", "--ntasks-per-node=1"]
    settings = [*settings, "model.tensor_model_parallel_size=2", "trainer.max_steps=40", "exp_manager.version=v1"]
    jobs = {}
    for name in ("undisturbed", "preempted"):
        results = tmp_path / name
        jobs[name] = submit(cluster, case, f"{results}.log", two_nodes, *settings, f"run.results_dir={results}")
        deadline = time.monotonic() + 600
        while name == "preempted" and len(steps_of(results / "v1")) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        if name == "preempted":
            cluster.run("scancel", "--batch", "--signal=USR1", jobs[name])
        assert cluster.wait(jobs[name]) == "COMPLETED", Path(f"{results}.log").read_text()
    log = (tmp_path / "preempted.log").read_text()
    assert f"job {jobs['preempted']}, start 0, 2 ranks on n[1-2]" in log and "start 1, 2 ranks" in log
    assert f"job {jobs['preempted']} goes back into the queue" in log
    assert not (tmp_path / "preempted" / "v1" / "REQUEUE").exists()
    runs = {name: steps_of(tmp_path / name / "v1") for name in jobs}
    assert [r["step"] for r in runs["undisturbed"]] == [r["step"] for r in runs["preempted"]] == list(range(1, 41))
    assert [r["loss"] for r in runs["undisturbed"]] == [r["loss"] for r in runs["preempted"]]
    models = [(tmp_path / name / "v1" / "hf" / "model.safetensors").read_bytes() for name in jobs]
    assert models[0] == models[1] != Path(case["policy"], "model.safetensors").read_bytes()
    # one log a rank, appended to by the second start
    logs = sorted((tmp_path / "preempted" / "logs").iterdir())
    assert [file.name for file in logs] == ["rank_0.log", "rank_1.log"]
    assert all(line in log for line in logs[0].read_text().splitlines()) and "resuming after step" in log


@pytest.mark.slow
def test_the_end_of_the_job_stops_the_run_in_time(cluster, case, settings, tmp_path):
    """By SLURM's own limit, which is a minute at least; no signal that means anything is sent."""
    words = [*settings, "trainer.max_steps=100000", f"run.results_dir={tmp_path}/run"]
    job = submit(cluster, case, f"{tmp_path}/log", ["--time=1", "--signal=B:URG@1"], *words)
    deadline, log = time.monotonic() + 120, tmp_path / "log"
    while not (log.is_file() and "goes back into the queue" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.5)
    cluster.run("scancel", job)
    steps = len(steps_of(tmp_path / "run"))
    said = f"stopped by the end of the SLURM job (rank 0) after step {steps} of 100000, saved at step {steps}"
    assert said in log.read_text() and f"job {job} goes back into the queue" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "state"),
    [(["--batch", "--signal=TERM"], "FAILED"), ([], "CANCELLED")],
    ids=["TERM", "a plain scancel"],
)
def test_told_to_end_it_saves_and_stays_away_and_nothing_that_waits_starts(
    cluster, case, settings, tmp_path, told, state
):
    results, log = tmp_path / "run", tmp_path / "log"
    words = [*settings, "trainer.max_steps=100000", "model.tensor_model_parallel_size=2", f"run.results_dir={results}"]
    job = submit(cluster, case, log, ["--nodes=2", "--ntasks-per-node=1"], *words)
    waits = ["--parsable", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", f"--output={tmp_path}/waits"]
    then = cluster.run("sbatch", *waits, "--wrap=true")
    deadline = time.monotonic() + 600
    while len(steps_of(results)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    cluster.run("scancel", *told, job)
    assert cluster.wait(job) == state and cluster.wait(then) == "CANCELLED", log.read_text()
    shown = cluster.run("scontrol", "-o", "show", "job", job)
    assert "ExitCode=75:0" in shown and "Restarts=0" in shown
    assert f"job {job} ends before its work is done; submit it again to go on" in log.read_text()
    step = int((results / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert f"after step {step} of 100000, saved at step {step}" in (results / "REQUEUE").read_text()


def test_an_array_of_two_seeds(cluster, case, settings, tmp_path):
    words = [*settings, "trainer.max_steps=1", "run.seed=%a", f"run.results_dir={tmp_path}/seed_%a", "run.export=false"]
    job = submit(cluster, case, f"{tmp_path}/%j.log", ["--array=3,5"], *words)
    states = [cluster.wait(f"{job}_{seed}") for seed in (3, 5)]
    assert states == ["COMPLETED"] * 2, [file.read_text() for file in tmp_path.glob("*.log")]
    losses = [steps_of(tmp_path / f"seed_{seed}")[0]["loss"] for seed in (3, 5)]
    assert losses[0] != losses[1]
    assert "seed: 5\n" in (tmp_path / "seed_5" / "config.yaml").read_text()


def test_mistakes_are_one_line(cluster, case, tmp_path):
    container = "--export=ALL,FUSERL_CONTAINER=/image.sqsh"
    mistakes = {
        "key": ([], ["optim.lrr=1"], "fuserl: error: optim.lrr: no such key"),
        "folder": ([], [f"run.results_dir={case['records']}/x"], f"{case['records']}/x/logs: cannot be made"),
        "array": (["--array=0"], [], "the tasks of an array need folders of their own"),
        "program": (["--export=ALL,PATH=/usr/bin:/bin"], [], "no fuserl on PATH"),
        # pyxis is what takes the option: without it srun says so, which shows that the option arrives
        "container": ([container], [], "unrecognized option '--container-image=/image.sqsh'"),
    }
    jobs = {
        name: submit(cluster, case, f"{tmp_path}/{name}.log", options, f"run.results_dir={tmp_path}/x", *words)
        for name, (options, words, _) in mistakes.items()
    }
    for name, (_, _, said) in mistakes.items():
        assert cluster.wait(jobs[name]) == "FAILED", name
        log = (tmp_path / f"{name}.log").read_text()
        assert said in log and "Traceback" not in log, log
