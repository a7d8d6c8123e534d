"""When checkpoints are written, and what happens when one cannot be: tried again, then the run goes on from memory.

Every method is called by all ranks at the same step; what they decide is the same on all of them.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from fuserl_megatron.config.schema import Config
from fuserl_megatron.mcore.checkpoint import begin_save
from fuserl_megatron.mcore.saving import NotWritten, Saving, remove_leftovers
from fuserl_megatron.mcore.step import Engine
from fuserl_megatron.metrics.run_log import say
from fuserl_megatron.runtime import collectives

PAUSE_S = 1.0
"""Before the second try; twice as long before each further one."""

FAULT = "that is a mistake of the program, not of the disk: please report it"

BYTES_A_PARAMETER, BYTES_A_SECOND = 16, 5e8
"""A guess: weights, fp32 master weights and two moments of a rank, at the speed of a shared file system."""


class Saver:
    """The checkpoints of one run. At most one is under way."""

    def __init__(self, config: Config, engine: Engine, checkpoints: Path, done: int, damaged: Sequence[int] = ()):
        """Start counting from the step resumed from, 0 for a fresh start; damaged: checkpoints found so on start."""
        self.engine, self.root, self.saved, self.damaged = engine, checkpoints, done, tuple(damaged)
        self.params = config.exp_manager.checkpoint_callback_params
        self.enabled = self.params.every_n_train_steps is not None or self.params.train_time_interval is not None
        self._failed: int | None = None  # the newest step that could not be saved
        self._remedy = ""
        self._since = time.monotonic()
        local = sum(p.numel() for chunk in engine.target.chunks for p in chunk.parameters() if p.requires_grad)
        self.seconds = local * BYTES_A_PARAMETER / BYTES_A_SECOND
        """What a checkpoint takes until it is on the disk: the longest so far, or a guess before the first."""
        self._under_way: tuple[Saving, Sequence[int]] | None = None
        self._tries = 0
        if engine.layout.is_main:  # a run killed after its last save has no further one that would
            remove_leftovers(checkpoints)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this many steps by their number or by the clock of rank 0."""
        every, minutes = self.params.every_n_train_steps, self.params.train_time_interval
        due = every is not None and every > 0 and step % every == 0
        if minutes is None:
            return due
        late = self.engine.layout.is_main and time.monotonic() - self._since >= 60 * minutes
        return collectives.any_rank(late, self.engine.layout.device) or due

    def save(self, step: int, progress: dict, kept: Sequence[int] = ()) -> None:
        """Write a checkpoint of this step, in the background where that is set; nothing when there is one already.

        JSON-able progress travels along; checkpoints of the steps in kept must stay.
        """
        self.wait()
        if not self.enabled or step == self.saved:
            return
        self._since, self._tries = time.monotonic(), 1
        saving = begin_save(self.engine, self.root, step, progress, self.params.async_save)
        self._under_way = saving, kept
        if not self.params.async_save:
            self.wait()

    def poll(self) -> None:
        """After every step: finish the checkpoint under way if all ranks have written it."""
        if self._under_way and self._under_way[0].is_written():
            self._finish()

    def wait(self) -> bool:
        """Finish the checkpoint under way. Returns whether the last one asked for is on the disk."""
        while self._under_way:
            self._finish()
        return self._failed is None

    def _finish(self) -> None:
        assert self._under_way is not None
        saving, kept = self._under_way
        keep = 1 if self.params.monitor is not None and self.params.save_top_k > 0 else self.params.save_top_k
        try:
            saving.publish(keep, kept, self.damaged)
        except NotWritten as error:
            self._retry(saving, error)
            return
        self._under_way, self.saved, self._failed = None, saving.iteration, None
        self.seconds = max(self.seconds, time.monotonic() - self._since)
        self.damaged = tuple(i for i in self.damaged if i != saving.iteration)

    def _retry(self, saving: Saving, error: NotWritten) -> None:
        tries = 1 + self.params.save_retries
        is_main = self.engine.layout.is_main
        say(f"WARNING: {error}; try {self._tries} of {tries}", is_main)
        if self._tries < tries:
            time.sleep(PAUSE_S * 2 ** (self._tries - 1))
            self._tries += 1
            saving.start()
            return
        self._under_way, self._failed = None, saving.iteration
        why, self._remedy = ("is the disk full?", "make room there") if error.by_disk else (f"{FAULT}.", FAULT)
        last = f"step {self.saved} in {self.root}" if self.saved else "none"
        say(
            f"WARNING: there is no checkpoint of step {saving.iteration}: {tries} tries failed; {why} "
            f"The last good one: {last}. The run goes on from memory",
            is_main,
        )

    def failure(self) -> str | None:
        """The line to end a run with whose last checkpoint is not on the disk, None where it is."""
        if self._failed is None:
            return None
        again = f"goes on from step {self.saved}" if self.saved else "starts anew"
        where = f"the last checkpoint, of step {self._failed}, could not be written to {self.root}"
        return f"{where}: {self._remedy}; the same command {again}"
