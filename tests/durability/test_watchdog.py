"""Hangs, logs and signs of life of a run of two ranks; a NaN on one of them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from fleet import ROOT, case_settings, records

from fuserl_megatron.runtime.watchdog import HUNG, Watchdog

TP2, DP2 = "model.tensor_model_parallel_size=2", "optim.use_distributed_optimizer=true"


def hang_at(number: int, rank: int) -> None:
    """Rank 1 never comes to the collectives of this step."""
    if rank == 1:
        from fuserl_megatron.mcore import step

        original, calls = step.forward_backward, []

        def where_it_hangs(*args, **kwargs):
            calls.append(1)
            while len(calls) == number:
                time.sleep(0.1)
            return original(*args, **kwargs)

        step.forward_backward = where_it_hangs


@pytest.mark.parametrize("done", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_hang_of_one_rank_ends_all_with_their_stacks(fleet, case, tmp_path, done):
    run = fleet.start(
        case_settings(case, tmp_path / "run", TP2, "trainer.max_steps=6", "trainer.hang_timeout_minutes=0.2"),
        tmp_path / "log",
        prelude=partial(hang_at, done + 1),
    )
    assert run.wait(600) == [HUNG, HUNG], run.text()
    line = f"rank 0: no step for 0.2 minutes after step {done} (trainer.hang_timeout_minutes): ended."
    assert line in run.text() and f"{tmp_path / 'run' / 'logs'}" in run.text()
    stacks = [(tmp_path / "run" / "logs" / f"rank_{rank}.log").read_text() for rank in range(2)]
    assert all(f"rank {rank}: no step for 0.2 minutes after step {done}" in text for rank, text in enumerate(stacks))
    assert "where_it_hangs" in stacks[1] and "where_it_hangs" not in stacks[0]
    assert "forward_backward" in stacks[0]  # which waits for the other
    assert json.loads((tmp_path / "run" / "heartbeat.json").read_text())["step"] <= done
    # the last checkpoint is whole: the same command goes on
    again = fleet.start(case_settings(case, tmp_path / "run", TP2, "trainer.max_steps=6"), tmp_path / "log")
    assert again.wait(600) == [0, 0], again.text()
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def wait_until(condition):
    deadline = time.monotonic() + 600
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_every_tick_counts_and_the_start_has_a_limit_of_its_own(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr("fuserl_megatron.runtime.watchdog.OTHERS_MAY_DUMP_S", 0.0)
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr(Watchdog, "_start_guardian", lambda self: None)  # it would end this process
    watchdog = Watchdog(1.0 / 60, tmp_path, 0, start_minutes=4.0 / 60)
    time.sleep(1.5)  # more than from step to step
    watchdog.tick()
    time.sleep(1.0)
    assert not (tmp_path / "logs").exists()
    watchdog.tick(0)
    for _ in range(10):
        time.sleep(0.2)
        watchdog.tick()
    assert not ended
    wait_until(lambda: ended)
    watchdog.close()
    assert ended and set(ended) == {HUNG}
    assert "no step for 0.0166667 minutes after step 0" in (tmp_path / "logs" / "rank_0.log").read_text()
    ended.clear()
    stuck = Watchdog(0.1 / 60, tmp_path / "start", 1, start_minutes=0.3 / 60)
    wait_until(lambda: ended)
    stuck.close()
    assert ended and "for 0.005 minutes before the first step" in (tmp_path / "start/logs/rank_1.log").read_text()
    off = Watchdog(0, tmp_path / "off", 1)
    off.tick(1)
    assert off._file is None and off._guardian is None


def test_the_last_heartbeat_is_of_the_last_step(tmp_path):
    watchdog = Watchdog(0, tmp_path, 0)
    for step in range(5):
        watchdog.tick(step)
    watchdog.close()
    assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 4


def test_a_run_that_was_suspended_goes_on(tmp_path):
    """Stopped for several times the limit, as by Ctrl-Z or `scontrol suspend`; then a hang, as the control."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom fuserl_megatron.runtime import watchdog\n"
        "watchdog.OTHERS_MAY_DUMP_S = 0.1\ndog = watchdog.Watchdog(1.5 / 60, Path('.'), 0)\ndog.tick(1)\n"
        "print('ready', flush=True)\n"
        "for _ in range(30):\n    time.sleep(0.1)\n    dog.tick()\n"
        "print('still there', flush=True)\ntime.sleep(2000)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    rank = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    assert rank.stdout.readline() == b"ready\n"
    rank.send_signal(signal.SIGSTOP)
    time.sleep(5)
    rank.send_signal(signal.SIGCONT)
    assert rank.stdout.readline() == b"still there\n"
    assert rank.wait(600) == HUNG


def stop_rank_one(rank: int) -> None:
    """Rank 1 is stopped while the model is made: the other one waits for it."""
    if rank == 1:
        from fuserl_megatron.train import loop

        loop.make_engine = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.slow
def test_a_rank_that_stops_before_the_first_step_is_noticed(fleet, case, tmp_path):
    limits = ("trainer.hang_timeout_minutes=0.1", "trainer.distributed_timeout_minutes=0.5")
    words = case_settings(case, tmp_path / "run", TP2, "trainer.max_steps=6", *limits)
    run = fleet.start(words, tmp_path / "log", prelude=stop_rank_one)
    run.until(lambda: run.ranks[0].exitcode is not None, timeout=90)
    assert "rank 0: nothing done for 0.5 minutes before the first step" in run.text() or run.ranks[0].exitcode == 1
    run.kill()


def plant_nan(where: str, rank: int) -> None:
    """The loss of rank 1's part of the third batch is no number, or only its gradient."""
    if rank == 1:
        from fuserl_megatron.objectives.batch_loss import BatchLoss

        original, calls = BatchLoss.__call__, []

        def broken(*args):
            total, metrics = original(*args)
            calls.append(1)
            if len(calls) == 3 and where == "gradient":
                total.register_hook(lambda gradient: gradient * math.nan)
            return (total * math.nan if len(calls) == 3 and where == "loss" else total), metrics

        BatchLoss.__call__ = broken


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nan_on_one_rank_stops_all_and_names_the_sequences(fleet, case, tmp_path, where):
    settings = case_settings(case, tmp_path / "run", DP2, "trainer.max_steps=6", "data.packing.enabled=false")
    run = fleet.start(settings, tmp_path / "log", prelude=partial(plant_nan, where))
    assert run.wait(600) == [1, 1], run.text()
    (line,) = [line for line in run.text().splitlines() if "not finite" in line]
    assert all(word in line for word in (f"the {where} is not", "rank 1, micro-batch", "prompts [", "responses ["))
    assert ("rank 0" in line) == (where == "gradient")  # which is summed over the ranks when it is looked at
    assert any(f"of {source}" in line for source in ("alpha", "beta", "gamma"))
    steps = [r["step"] for r in records(tmp_path / "run")]
    assert steps and steps == list(range(1, len(steps) + 1)) and f"stopped before step {len(steps) + 1}:" in run.text()
    plain = fleet.start(settings, tmp_path / "log")  # the control: without the plant the same command goes on
    assert plain.wait(600) == [0, 0], plain.text()
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def say_something(rank: int) -> None:
    from fuserl_megatron.train import loop

    original = loop.train

    def chatty(config):
        print(f"rank {rank} says hello", flush=True)
        return original(config)

    loop.train = chatty


def test_each_rank_has_its_log(fleet, case, tmp_path):
    run = fleet.start(
        case_settings(case, tmp_path / "run", TP2, "trainer.max_steps=1"), tmp_path / "log", prelude=say_something
    )
    assert run.wait(600) == [0, 0], run.text()
    assert "rank 0 says hello" in run.text() and "rank 1 says hello" not in run.text()
    assert "rank 1 says hello" in (tmp_path / "run" / "logs" / "rank_1.log").read_text()
    assert (tmp_path / "run" / "logs" / "rank_0.log").read_text() == ""  # the place for its stacks


def python(code, directory):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600)


def test_a_hang_that_keeps_pythons_lock_ends_too(tmp_path):
    code = (
        "import re\nfrom pathlib import Path\nfrom fuserl_megatron.runtime import watchdog\n"
        "watchdog.OTHERS_MAY_DUMP_S = 0.1\nwatchdog.Watchdog(0.3 / 60, Path('.'), 0).tick(1)\n"
        "def where_it_hangs(): re.match('(a+)+$', 60 * 'a' + 'b')  # for centuries\nwhere_it_hangs()"
    )
    done = python(code, tmp_path)
    assert done.returncode == -signal.SIGKILL and "gave no sign of life" in done.stderr
    assert "where_it_hangs" in (tmp_path / "logs" / "rank_0.log").read_text()


def test_an_error_is_seen_in_both_places(tmp_path):
    code = (
        "import os\nfrom pathlib import Path\nfrom fuserl_megatron.runtime.watchdog import own_log\n"
        "with own_log(Path('.'), {'SLURM_PROCID': '7'}):\n"
        "    print('hello', flush=True); os.system('echo from C'); raise ValueError('the disk is gone')"
    )
    done = python(code, tmp_path)
    logged = (tmp_path / "logs" / "rank_7.log").read_text()
    assert done.stdout == "" and done.stderr.endswith("ValueError: the disk is gone\n")
    assert "hello\nfrom C\nTraceback" in logged and logged.endswith("ValueError: the disk is gone\n")
