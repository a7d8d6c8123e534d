"""Saves in the background: the bits of the step they were asked at, whatever training does meanwhile."""

import contextlib
import dataclasses
import json
import threading
from pathlib import Path

import pytest
from fusion_case import SFT, make_config

from fuserl_megatron.config.schema import CheckpointConfig

STEPS, EVERY, RELEASED = 6, 3, 5


def run(config, prepare):
    from fuserl_megatron.train.loop import train

    with prepare(Path(config.run.results_dir)):
        return train(config)


@contextlib.contextmanager
def undisturbed(directory):
    yield


@contextlib.contextmanager
def held_until_two_more_steps_are_done(directory):
    """The writer of step 3 may begin only after step 5 has updated the weights and moments."""
    from fuserl_megatron.mcore import saving
    from fuserl_megatron.train import loop

    released, step_done, write, train_step = threading.Event(), [0], saving.Saving._write, loop.train_step

    def held(self):
        assert released.wait(600), "step 5 never came: training waited for the writer"
        write(self)

    def counted(*args, **kwargs):
        result = train_step(*args, **kwargs)
        step_done[0] += 1
        if step_done[0] == RELEASED:
            assert not (directory / "checkpoints" / f"iter_{EVERY:07d}").exists()
            released.set()
        return result

    saving.Saving._write, loop.train_step = held, counted
    try:
        yield
    finally:
        saving.Saving._write, loop.train_step = write, train_step


@contextlib.contextmanager
def held_without_a_copy(directory):
    from fuserl_megatron.mcore import saving

    copy, saving.snapshot = saving.snapshot, lambda tensor: tensor.detach()
    try:
        with held_until_two_more_steps_are_done(directory):
            yield
    finally:
        saving.snapshot = copy


def checksums(directory, step):
    """Of every file of a checkpoint; without progress.json, which holds the run's directory."""
    manifest = json.loads((Path(directory) / "checkpoints" / f"iter_{step:07d}" / "manifest.json").read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items() if name != "progress.json"}


@pytest.mark.parametrize(
    "layout",
    [dict(tp=2, precision="bf16"), dict(distopt=True, overlap=True)],
    ids=["tp2 bf16", "dp2 distributed optimizer, overlapped"],
)
def test_training_on_while_saving_changes_no_bit_of_the_checkpoint(ranks, case, tmp_path, layout):
    def finished(name, prepare, async_save):
        config = make_config(
            case, SFT, global_batch_size=3, max_steps=STEPS, results_dir=str(tmp_path / name), **layout
        )
        checkpoint = CheckpointConfig(every_n_train_steps=EVERY, async_save=async_save)
        manager = dataclasses.replace(config.exp_manager, checkpoint_callback_params=checkpoint)
        assert ranks.run(run, 2, dataclasses.replace(config, exp_manager=manager), prepare) == [0, 0]
        return tmp_path / name

    expected = finished("sync", undisturbed, False)
    actual = finished("async", held_until_two_more_steps_are_done, True)
    for step in (EVERY, STEPS):
        assert len(checksums(expected, step)) >= 4
        assert checksums(actual, step) == checksums(expected, step)
    control = finished("control", held_without_a_copy, True)
    wrong = checksums(control, EVERY)
    assert [wrong[n] != checksums(expected, EVERY)[n] for n in sorted(wrong) if n.endswith(".distcp")].count(True) >= 1
    assert checksums(control, STEPS) == checksums(expected, STEPS)
