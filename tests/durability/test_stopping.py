"""USR1 and TERM at every stage of a run of two ranks: all ranks leave together, what is there is saved, and the same
command goes on. The moments are made wide by slowing the product's own functions down, not by replacing them."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from fleet import case_settings, records

from fuserl_megatron.checkpoint.manifest import find_damage
from fuserl_megatron.runtime import stopping

TP2 = "model.tensor_model_parallel_size=2"
ASYNC = "exp_manager.checkpoint_callback_params.async_save=true"
SOON_S = 600.0


def slow(module: str, function: str, flag: str, seconds: float, rank: int) -> None:
    """In a rank: every call of module.function makes a file (see `all_there`) and takes `seconds` longer."""
    import importlib

    place = importlib.import_module(module)
    original = getattr(place, function)

    def slowed(*args, **kwargs):
        Path(f"{flag}{rank}").touch()
        time.sleep(seconds)
        return original(*args, **kwargs)

    setattr(place, function, slowed)


def all_there(flag):
    """Whether both ranks have called the function."""
    return all(Path(f"{flag}{rank}").exists() for rank in range(2))


def settings(case, directory, *more):
    return case_settings(case, directory / "run", TP2, "trainer.max_steps=6", *more)


def stop_at(fleet, case, directory, module, function, *more, number=signal.SIGTERM, rank=None):
    """Start a run, send a signal when it is in module.function; its words and marker once all ranks have left."""
    flag = directory / "there"
    run = fleet.start(
        settings(case, directory, *more), directory / "log", prelude=partial(slow, module, function, str(flag), 0.3)
    )
    run.until(partial(all_there, flag))
    sent = time.monotonic()
    run.send(number, rank)
    assert run.wait(SOON_S) == [0, 0], run.text()
    assert time.monotonic() - sent < SOON_S
    marker = (directory / "run" / "REQUEUE").read_text().splitlines()
    assert len(marker) == 2 and "Traceback" not in run.text()
    assert f"{marker[0]}; continue with: {marker[1]}" in run.text().splitlines()
    return marker


def finish(fleet, directory, words):
    run = fleet.start(words, directory / "log")
    assert run.wait(600) == [0, 0], run.text()
    assert not (directory / "run" / "REQUEUE").exists()
    assert (directory / "run" / "hf" / "model.safetensors").exists()
    return run


@pytest.mark.parametrize(
    "number, rank",
    [pytest.param(signal.SIGUSR1, None, id="USR1", marks=pytest.mark.slow), pytest.param(signal.SIGTERM, 1, id="TERM")],
)
def test_a_signal_in_the_first_step_saves_after_it(fleet, case, tmp_path, number, rank):
    marker = stop_at(fleet, case, tmp_path, "fuserl_megatron.mcore.step", "forward_backward", number=number, rank=rank)
    told = number.name
    assert marker[0] == f"stopped by {told} (rank {rank or 0}) after step 1 of 6, saved at step 1"
    # the command is the one that was typed, quoted for a shell
    assert shlex.split(marker[1]) == ["cd", os.getcwd(), "&&", "fuserl", "train", *settings(case, tmp_path)]
    assert "resuming after step 1" in finish(fleet, tmp_path, settings(case, tmp_path)).text()
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_signal_before_anything_is_loaded(fleet, case, tmp_path):
    marker = stop_at(fleet, case, tmp_path, "fuserl_megatron.config.load", "load_config")
    assert marker[0] == "stopped by SIGTERM (rank 0) before the first step"
    assert not list((tmp_path / "run").glob("checkpoints/iter_*"))
    finish(fleet, tmp_path, settings(case, tmp_path))


def test_a_signal_during_validation(fleet, case, tmp_path):
    """It stops between two batches; the resumed run validates again and decides as if nothing had happened."""
    more = (f"data.validation_path={case['data']}", "trainer.val_check_interval=1")
    marker = stop_at(fleet, case, tmp_path, "fuserl_megatron.train.validation", "evaluate", *more)
    assert marker[0] == "stopped by SIGTERM (rank 0) before the first step"
    finish(fleet, tmp_path, settings(case, tmp_path, *more))
    assert [r["step"] for r in records(tmp_path / "run", "validation.jsonl")] == [0, 1, 2, 3, 4, 5, 6]


def test_a_signal_during_the_reference_pass(fleet, case, tmp_path):
    more = ("objective=fusepo_dpo", "objective.beta=0.3", f"objective.reference={case['reference']}")
    marker = stop_at(fleet, case, tmp_path, "fuserl_megatron.train.reference", "score", *more)
    assert marker[0] == "stopped by SIGTERM (rank 0) before the first step"
    finish(fleet, tmp_path, settings(case, tmp_path, *more))


def hold_the_writer(flag: str, forgetful: bool, rank: int) -> None:
    """The writer of the first checkpoint may begin only when the run waits for it, and the step after it takes until
    the signal is there. forgetful: the mistake of leaving without waiting."""
    import threading

    from fuserl_megatron.mcore import saving
    from fuserl_megatron.train import loop, saver

    awaited, writers, step_of = threading.Event(), [], loop.train_step
    write, publish = saving.Saving._write, saving.Saving.publish

    def held_write(self):
        writers.append(self.iteration)
        if len(writers) == 1:
            awaited.wait(SOON_S)
        write(self)

    def awaited_publish(self, *args):
        awaited.set()
        return publish(self, *args)

    def told_step(*args, **kwargs):
        if writers == [2]:
            Path(f"{flag}{rank}").touch()
            while not stopping._received:
                time.sleep(0.01)
        return step_of(*args, **kwargs)

    saving.Saving._write, saving.Saving.publish, loop.train_step = held_write, awaited_publish, told_step
    if forgetful:
        saver.Saver.wait = lambda self: True


def checkpoints_of(directory):
    """What stands in checkpoints/: for each step what is wrong with it, and the names of all else."""
    root = directory / "run" / "checkpoints"
    steps = {int(p.name[5:]): find_damage(p, int(p.name[5:])) for p in root.glob("iter_*")}
    return steps, {p.name for p in root.iterdir() if not p.name.startswith("iter_")}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(TP2, id="tp2", marks=pytest.mark.slow),
        pytest.param("optim.use_distributed_optimizer=true", id="dp2 distributed optimizer"),
    ],
)
def test_a_signal_while_a_checkpoint_is_written_in_the_background(fleet, case, tmp_path, more):
    """Both are on the disk when the run leaves: the one under way, and the one of the step it was stopped after."""
    words = {
        name: case_settings(case, tmp_path / name / "run", "trainer.max_steps=6", more, *switches)
        for name, switches in {"stopped": [ASYNC], "undisturbed": [], "control": [ASYNC]}.items()
    }
    for name in ("stopped", "control"):
        (tmp_path / name).mkdir()
        prelude = partial(hold_the_writer, str(tmp_path / name / "there"), name == "control")
        run = fleet.start(words[name], tmp_path / name / "log", prelude=prelude)
        run.until(partial(all_there, tmp_path / name / "there"))
        assert checkpoints_of(tmp_path / name)[0] == {}  # the writer has not begun
        run.send(signal.SIGTERM)
        assert run.wait(SOON_S) == [0, 0], run.text()
        marker = (tmp_path / name / "run" / "REQUEUE").read_text().splitlines()
        whole = checkpoints_of(tmp_path / name) == ({2: None, 3: None}, {"latest_checkpointed_iteration.txt"})
        assert whole == (name == "stopped") and (", saved at step 3" in marker[0]) == whole, marker
    (tmp_path / "undisturbed").mkdir()
    for name in ("stopped", "undisturbed"):
        finish(fleet, tmp_path / name, words[name])
    assert "resuming after step 3" in (tmp_path / "stopped" / "log").read_text()
    results = [tmp_path / name / "run" for name in ("stopped", "undisturbed")]
    losses = [[(r["step"], r["loss"], r["grad_norm"]) for r in records(result)] for result in results]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    weights = [(result / "hf" / "model.safetensors").read_bytes() for result in results]
    assert weights[0] == weights[1]


def test_a_second_signal_ends_at_once(fleet, case, tmp_path):
    """Also while the main thread sits in a call that does not return."""
    flag = tmp_path / "there"
    prelude = partial(slow, "fuserl_megatron.mcore.step", "forward_backward", str(flag), 3000.0)
    run = fleet.start(settings(case, tmp_path), tmp_path / "log", prelude=prelude)
    run.until(partial(all_there, flag))
    run.send(signal.SIGTERM)
    run.send(signal.SIGTERM)  # the same one over two ways
    time.sleep(stopping.SAME_SIGNAL_S + 0.3)
    assert run.alive()
    run.send(signal.SIGUSR1)
    assert run.wait(SOON_S) == [128 + signal.SIGUSR1] * 2
    assert not (tmp_path / "run" / "REQUEUE").exists()


def launched(case, directory, *more):
    """`fuserl train` as it is typed, with ranks of its own, in a process group as a terminal makes one."""
    command = [sys.executable, "-m", "fuserl_megatron.cli", "train", *settings(case, directory, *more)]
    return subprocess.Popen(
        [*command, "--nproc", "2"], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_ctrl_c_saves_and_a_second_run_in_its_folder_is_refused(case, tmp_path):
    """Ctrl-C reaches launcher and ranks, from the terminal; the first one is as good as SIGTERM."""
    run = launched(case, tmp_path, "trainer.max_steps=100000")
    heartbeat = tmp_path / "run" / "heartbeat.json"
    deadline = time.monotonic() + 600
    while not heartbeat.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "config.yaml",)}
    second = launched(case, tmp_path, "optim.lr=1e-7")
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 2 and len(said.splitlines()) == 1, said
    assert re.search(r"run: process \d+ on \S+, since .*, writes there: wait, stop it, or choose another run", said)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    os.killpg(run.pid, signal.SIGINT)
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 0, said
    assert "SIGINT: stopping after this step or batch; once more ends at once, unsaved" in said
    marker = (tmp_path / "run" / "REQUEUE").read_text().splitlines()
    assert re.fullmatch(r"stopped by SIGINT \(rank \d\) after step \d+ of 100000, saved at step \d+", marker[0])
    assert "Traceback" not in said and not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_without_the_callback_a_signal_kills(fleet, case, tmp_path):
    flag = tmp_path / "there"
    prelude = partial(slow, "fuserl_megatron.mcore.step", "forward_backward", str(flag), 0.3)
    off = "exp_manager.create_preemption_callback=false"
    run = fleet.start(settings(case, tmp_path, off), tmp_path / "log", prelude=prelude)
    run.until(partial(all_there, flag))
    run.send(signal.SIGTERM)
    assert run.wait(SOON_S) == [-signal.SIGTERM] * 2


@pytest.mark.slow
def test_a_time_limit_stops_as_a_signal_does_but_never_without_a_step(fleet, case, tmp_path):
    more = "exp_manager.max_time_per_run=00:00:00:01"
    for start in (1, 2):
        run = fleet.start(settings(case, tmp_path, more), tmp_path / "log")
        assert run.wait(SOON_S * 2) == [0, 0], run.text()
        first, command = (tmp_path / "run" / "REQUEUE").read_text().splitlines()
        assert first == (
            "stopped by the time limit exp_manager.max_time_per_run=00:00:00:01 (rank 0) "
            f"after step {start} of 6, saved at step {start}"
        )
        assert more in command


def test_the_time_for_a_step_and_a_save_is_left(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(stopping.time, "time", lambda: now[0])
    monkeypatch.setattr(stopping, "STARTED", 1000.0)
    both = stopping.Stopping(None, "00:00:10:00", {"SLURM_JOB_END_TIME": "1500"})
    assert both.deadline == 1500.0 and both.limit == "the end of the SLURM job"
    assert stopping.Stopping(None, "00:00:08:00", {"SLURM_JOB_END_TIME": "1500"}).deadline == 1480.0
    assert not stopping.Stopping(None, None, {}).wanted()
    both.save_s = 60.0
    asked = []
    for _ in range(30):
        asked.append(both.wanted())
        now[0] += 20.0
    # 20 s a step, 60 s a save: 1.5 x 80 + 5 before the end
    assert asked.index(True) == next(i for i in range(30) if 20 * i + 125 > 500)


@pytest.mark.parametrize(
    "environ, front",
    [
        ({}, "fuserl"),
        ({"FUSERL_COMMAND": "sbatch my.sh"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun --ntasks=8 fuserl"),
        (
            {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"},
            "torchrun --nnodes=2 --nproc-per-node=4 -m fuserl_megatron.cli",
        ),
    ],
)
def test_the_resume_command_can_be_typed_as_it_is(tmp_path, monkeypatch, environ, front):
    directory = tmp_path / "a place"
    directory.mkdir()
    monkeypatch.chdir(directory)
    words = ["train", "run.name=it's", "data.path=a b"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/fuserl", *words])
    command = stopping.resume_command(environ)
    if front is None:
        assert command.endswith(" && sbatch my.sh")
        return
    shown = subprocess.run(
        ["bash", "-c", command.replace("&& ", '&& printf "%s\\n" "$PWD" ')], capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines() == [str(directory), *front.split(), *words]
