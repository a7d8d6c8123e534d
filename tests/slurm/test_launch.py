"""`fuserl launch` on a real SLURM: what a dry run shows is what SLURM gets, the chain completes, a failure stops it."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from stub_server import Stub

from fuserl_megatron.cli import main


@pytest.fixture
def words(case, settings, tmp_path):
    """A chain of every stage; what it trains on is built by it."""
    builds = [
        f"build_{name}.{word}"
        for name in ("sft", "po", "heldout")
        for word in (f"inputs=[{case['records']}]", "reward_temperature=0.05", "max_length=96")
    ]
    return [
        "cluster=slurm",
        f"target={case['policy']}",
        f"run.results_dir={tmp_path / 'run'}",
        *builds,
        *(f"train.{word}" for word in (*settings, "trainer.max_steps=2")),
        "fusepo.objective=fusepo_ln_dpo",
    ]


def job_of(cluster, job):
    return dict(f.split("=", 1) for f in cluster.run("scontrol", "-o", "show", "job", job).split() if "=" in f)


def test_the_chain_completes_and_is_what_the_dry_run_showed(cluster, words, tmp_path, capfd):
    words.append("stages=[import,build_sft,build_po,build_heldout,fusesft,reference,fusepo,export,evaluate]")
    assert main(["launch", "--dry-run", *words]) == 0
    shown = capfd.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main(["launch", *words]) == 0
    said, folder = capfd.readouterr().out, tmp_path / "run" / "launch"
    jobs = json.loads((folder / "jobs.json").read_text())
    assert list(jobs) == [
        "build_sft",
        "build_po",
        "build_heldout",
        "fusesft",
        "reference",
        "fusepo",
        "export",
        "evaluate",
    ]
    assert "import: nothing to do" in said and f"scancel {' '.join(jobs.values())}" in said
    for name, job in jobs.items():
        submitted = cluster.run("scontrol", "write", "batch_script", job, "-")
        (script,) = re.findall(
            rf"# ---- {re.escape(str(folder / name))}\.sbatch\n(.*?)\n# ---- submit\n", shown, re.DOTALL
        )
        assert submitted.strip() == script.strip()
        (command,) = re.findall(rf"^{name}=\$\((.*)\)$", shown, re.MULTILINE)
        waits = {jobs[other] for other in re.findall(r"afterok:\$(\w+)", command)}
        pending = set(re.findall(r"afterok:(\d+)", job_of(cluster, job)["Dependency"]))
        assert pending <= waits and (pending == waits or not name.startswith(("fuse", "export")))
        config = folder / f"{name}.yaml"
        assert not config.exists() or f"# ---- {config}\n{config.read_text()}" in shown
    for name, job in jobs.items():
        assert cluster.wait(job) == "COMPLETED", (folder / f"{name}.log").read_text()
    found = json.loads((tmp_path / "run" / "evaluate" / "evaluation.json").read_text())
    assert found["model"] == str(tmp_path / "run" / "export") and found["fusepo"]["prompts"] == 7
    assert "found in" in (folder / "fusepo.log").read_text()  # what the stage reference has scored
    origin = json.loads((folder / "launch.json").read_text())
    assert origin["overrides"] == words and origin["version"]
    # again: nothing is left to do; a changed stage, and what reads it, is
    assert main(["launch", *words]) == 0
    assert capfd.readouterr().out.count(": done (") == len(jobs)
    assert (
        main(["launch", "--dry-run", *words, "evaluate.trainer.limit_val_prompts=null", "export.dtype=bfloat16"]) == 0
    )
    assert re.findall(r"^(\w+)=\$\(sbatch", capfd.readouterr().out, re.MULTILINE) == ["export", "evaluate"]


def test_a_failing_stage_cancels_what_waits_for_it(cluster, words, case, tmp_path, capfd):
    broken = Path(shutil.copytree(case["data"], tmp_path / "broken"))
    (broken / "groups.arrow").unlink()  # one that is not there at all would be refused before
    words += ["stages=[fusesft,fusepo,export]", f"fusesft.data.path={broken}", f"fusepo.data.path={case['data']}"]
    assert main(["launch", *words]) == 0
    folder = tmp_path / "run" / "launch"
    jobs = json.loads((folder / "jobs.json").read_text())
    assert [cluster.wait(job) for job in jobs.values()] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert f"fuserl: error: {broken}" in (folder / "fusesft.log").read_text()
    assert not list(folder.glob("*.done")) and not (tmp_path / "run" / "fusepo").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["fusepo.cluster.partition=gpuu"], "fusepo: invalid partition specified: gpuu"),
        (["cluster.dependency=afterok:x"], "fusesft: Batch job submission failed: Job dependency problem"),
        (["run.results_dir=/proc/run"], "/proc/run"),
    ],
)
def test_what_sbatch_refuses_is_one_line_and_nothing_stays(cluster, words, case, more, said, capfd):
    words += ["stages=[fusesft,fusepo]", f"fusesft.data.path={case['data']}", f"fusepo.data.path={case['data']}"]
    assert main(["launch", *words, *more]) == 2
    error = capfd.readouterr().err
    assert error.startswith("fuserl: error: ") and said in error and error.count("\n") == 1
    deadline = time.monotonic() + 600
    while cluster.run("squeue", "--noheader") and time.monotonic() < deadline:  # one that began takes a moment
        time.sleep(0.1)
    assert cluster.run("squeue", "--noheader") == ""


def test_without_sbatch_and_over_a_chain_that_waits(cluster, words, case, monkeypatch, capfd):
    words += ["stages=[fusesft]", f"fusesft.data.path={case['data']}"]
    assert main(["launch", *words, "cluster.sbatch_options=[--hold]"]) == 0
    assert main(["launch", *words]) == 2
    job = re.search(r"scancel (\d+)", capfd.readouterr().err).group(1)
    cluster.run("scancel", job)
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", *words]) == 2
    assert "there is no sbatch on PATH" in capfd.readouterr().err


def test_no_value_becomes_a_command_of_the_job_script(cluster, case, tmp_path, capfd):
    """Names and paths with what shells and sbatch take for their own; the job is named as it was asked to be."""
    name, root = "a\"b c'd $(touch P) `touch P` & % # \\x", tmp_path / "r %j \"q\" 'a' $(touch P) & #"
    override = name.replace('"', '\\"')
    words = ["cluster=slurm", f"target={case['policy']}", "stages=[build_sft]", f'run.name="{override}"']
    words += ['run.results_dir="' + str(root).replace('"', '\\"') + '"', "build_sft.reward_temperature=0.05"]
    words += [f"build_sft.inputs=[{case['records']}]", "build_sft.max_length=96"]
    assert main(["launch", *words]) == 0, capfd.readouterr().err
    (job,) = json.loads((root / "launch" / "jobs.json").read_text()).values()
    shown = cluster.run("scontrol", "show", "job", job)
    assert re.search(r"JobName=(.*)", shown)[1] == f"{name}-build_sft"
    assert cluster.wait(job) == "COMPLETED", shown
    assert (root / "build_sft" / "groups.arrow").exists()
    assert not [path for folder in (tmp_path, Path.cwd()) for path in folder.rglob("P") if path.name == "P"]


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_a_sampling_that_is_requeued_in_its_middle_and_what_waits_for_it(cluster, case, tmp_path, shards):
    """Told to stop with answers under way: the same job, or the same task of the array, goes on, nothing is asked
    twice, and score starts behind it."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(40)))
    with Stub(seed=3).running() as stub:
        stub.delay = 0.3
        (tmp_path / "a.yaml").write_text(f"{{model: m, url: {stub.url}, max_in_flight: 1}}\n")
        words = ["cluster=slurm", f"target={case['policy']}", f"run.results_dir={tmp_path / 'run'}", "sample.n=2"]
        words += ["stages=[sample,score,build_sft]", f"sample.prompts=[{tmp_path}/prompts.jsonl]"]
        words += [f"sample.sources=[{tmp_path}/a.yaml]", "score.rewards=[length]", "score.policy.truncated=keep"]
        words.append(f"sample.shards={shards}")
        words += ["build_sft.reward_temperature=1", "build_sft.max_length=512"]
        assert main(["launch", *words]) == 0
        run = tmp_path / "run"
        jobs, log = json.loads((run / "launch" / "jobs.json").read_text()), run / "launch" / "sample.log"
        told, done = jobs["sample"], run / "launch" / "sample.done"
        if shards > 1:  # the last task, whose job id is that of the whole array
            told, log, done = f"{told}_1", log.with_name("sample_1.log"), done.with_name("sample.done.1")
        deadline = time.monotonic() + 600
        while stub.counts["answers"] < 10 and time.monotonic() < deadline:
            time.sleep(0.05)
        cluster.run("scancel", "--batch", "--signal=USR1", told)
        while not (log.exists() and "goes back into the queue" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        kept = sum(len(file.read_text().splitlines()) for file in run.glob("sample/a/**/part-*.jsonl"))
        assert 0 < kept < 80 and not done.exists() and not (run / "score").exists()
        stub.delay, asked = 0.0, stub.counts["answers"]
        for name, job in jobs.items():
            assert cluster.wait(job) == "COMPLETED", "".join(f.read_text() for f in run.glob(f"launch/{name}*.log"))
        assert stub.counts["answers"] - asked <= 80 - kept + 4 * shards  # a few prove the server anew
    assert ", start 1, " in log.read_text()
    rows = [json.loads(line) for file in run.glob("sample/a/**/part-*.jsonl") for line in file.read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 80
    assert len((run / "score" / "records.jsonl").read_text().splitlines()) == 80
    assert (run / "build_sft" / "groups.arrow").exists()
