"""slurm/train.sbatch read by bash, with an srun that shows what it is given: arrays and odd values. The rest of the
script is tested on a real cluster (tests/slurm)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "slurm" / "train.sbatch"
SRUN = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"


@pytest.fixture
def run_script(tmp_path):
    for name in ("srun", "fuserl"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(SRUN)
        (tmp_path / "bin" / name).chmod(0o755)
    base = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "MASTER_ADDR": "n1", "SLURM_JOB_END_TIME": "1"}
    base |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}

    def run(*words, **environ):
        command = ["bash", str(SCRIPT), *words]
        return subprocess.run(command, cwd=tmp_path, env=base | environ, capture_output=True, text=True, timeout=600)

    return run


def given(done):
    """The words that srun was started with."""
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("run.seed=%a", "run.seed=1"),
        ("run.name=100%accurate", "run.name=100%accurate"),
        ("run.name=a%vb", "run.name=a%vb"),
        ("run.name=%a%v", "run.name=1x&y"),
        ("data.reward_temperature=%v", "data.reward_temperature=x&y"),
        ("run.name=a b '$(touch z)' \"%a\" %", "run.name=a b '$(touch z)' \"1\" %"),
        ("run.name=two\nlines %a", "run.name=two\nlines 1"),
    ],
)
def test_array_marks_are_filled_in_and_nothing_else(run_script, word, expected):
    done = run_script(word, "run.results_dir=r/50%/%a", SLURM_ARRAY_TASK_ID="1", FUSERL_VALUES="a x&y")
    words = given(done)
    assert words[-3:] == ["train", expected, "run.results_dir=r/50%/1"]
    assert "--output=r/50%%/1/logs/rank_%t.log" in words  # in srun's pattern %% is a percent sign


def test_without_an_array_nothing_is_filled_in(run_script):
    assert given(run_script("run.seed=%a", "run.results_dir=r/%v"))[-2:] == ["run.seed=%a", "run.results_dir=r/%v"]


@pytest.mark.parametrize("index", ["2", "9"])
def test_a_task_past_the_end_of_the_values_stops(run_script, index, tmp_path):
    done = run_script("run.results_dir=r/tau_%v", SLURM_ARRAY_TASK_ID=index, FUSERL_VALUES="0.1 0.2")
    assert done.returncode == 2 and done.stdout == ""
    assert f"FUSERL_VALUES has 2 words, counted from 0, and none for task {index}" in done.stderr
    assert not (tmp_path / "r").exists()


def test_tasks_without_folders_of_their_own_stop(run_script):
    done = run_script("run.results_dir=r/%accurate", SLURM_ARRAY_TASK_ID="0", FUSERL_VALUES="0.1")
    assert done.returncode == 2 and "need folders of their own" in done.stderr
