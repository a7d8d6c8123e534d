"""A real full disk (a small tmpfs): what was good stays, the run goes on, its log loses no line."""

import contextlib
import subprocess
from functools import partial
from pathlib import Path

import pytest
from fleet import case_settings, records

from fuserl_megatron.checkpoint.manifest import find_damage

FULL = "No space left on device"


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(disk):
    with contextlib.suppress(OSError), open(f"{disk}/filler", "wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass


def fill_the_disk(disk: str, rank: int) -> None:
    """From step 2 on not a byte is left, until a checkpoint has failed: several pages of metrics.jsonl later."""
    from fuserl_megatron.train import loop, saver

    train_step, retry, calls = loop.train_step, saver.Saver._retry, []

    def step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 and rank == 0:
            fill(disk)
        return train_step(*args, **kwargs)

    def make_room(*args):
        Path(disk, "filler").unlink(missing_ok=True)
        retry(*args)

    loop.train_step, saver.Saver._retry = step, make_room


@pytest.mark.parametrize("background", [pytest.param("false", id="sync", marks=pytest.mark.slow), "true"])
def test_a_run_outlives_a_full_disk_and_its_log_is_whole(fleet, case, disk, tmp_path, background):
    """A real one: heartbeat, metrics and the checkpoint of step 10 all meet it."""
    params = "exp_manager.checkpoint_callback_params"
    words = ["trainer.max_steps=12", f"{params}.every_n_train_steps=10", f"{params}.save_retries=0"]
    words += ["optim.use_distributed_optimizer=true", f"{params}.async_save={background}"]
    prelude = partial(fill_the_disk, str(disk))
    run = fleet.start(case_settings(case, disk / "run", *words), tmp_path / "log", prelude=prelude)
    assert run.wait(600) == [0, 0], run.text()
    assert [r["step"] for r in records(disk / "run")] == [*range(1, 13)]
    log, save, end = [line for line in run.text().splitlines() if line.startswith("WARNING")]
    assert log == f"WARNING: {disk}/run/metrics.jsonl: {FULL}: its lines wait in memory until there is room"
    assert "iter_0000010: not written" in save and FULL in save and "no checkpoint of step 10" in end
    root = disk / "run" / "checkpoints"
    assert {p.name for p in root.iterdir()} == {"iter_0000012", "latest_checkpointed_iteration.txt"}
    assert find_damage(root / "iter_0000012", 12) is None


def test_a_start_on_a_full_disk_is_one_line(fleet, case, disk, tmp_path):
    fill(disk)
    run = fleet.start(case_settings(case, disk / "run", "trainer.max_steps=2"), tmp_path / "log", world=1)
    assert run.wait(600) == [2], run.text()
    said = f"fuserl: error: {disk}/run: {FULL}: make room there; the same command goes on from the last checkpoint."
    assert said in run.text().splitlines() and "Traceback" not in run.text()
