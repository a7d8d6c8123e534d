"""All sources of a run, asked in one event loop.

Sources that run elsewhere are asked side by side; those whose servers we start come one after the other, for each needs
the machine. Every source has a directory of its own (accounting.py), so runs of different sources never share a file.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from fuserl_megatron.config.sample_sections import AskConfig
from fuserl_megatron.making.sample_display import Display
from fuserl_megatron.making.source_run import SourceRun
from fuserl_megatron.runtime import stopping
from fuserl_megatron.util.errors import UserError

LEAST_S = 30.0
"""Something is done at every start, or a job with too little time would be continued for ever."""


def conduct(config: AskConfig, runs: Sequence[SourceRun]) -> str:
    """Run until everything is there, or until a signal, whose name is returned then.

    Raises:
        UserError: something the user can put right. What came until then is kept.
    """
    with Display(Path(config.output)) as display:
        told = asyncio.run(_Conductor(config, runs, display).run())
    return told if any(run.done is None for run in runs) else ""


class _Conductor:
    """All sources of a run in one event loop, with the signals."""

    def __init__(self, config: AskConfig, runs: Sequence[SourceRun], display: Display):
        self.config, self.runs, self.display = config, runs, display
        self.told, self._told_at = "", 0.0
        self._errors: list[Exception] = []
        self._is_looking = True

    async def run(self) -> str:
        """Returns the name of the signal, or what else ended the run early; empty when all is there."""
        loop = asyncio.get_running_loop()
        for number in stopping.HEARD:
            loop.add_signal_handler(number, self._signal, number)
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        if end.isdigit():
            left = float(end) - time.time() - self.config.grace - stopping.MARGIN_S
            loop.call_later(max(left, LEAST_S), self._stop, "the end of the SLURM job")
        watching = asyncio.create_task(self._watch())
        self._asking = asyncio.create_task(self._ask_all())
        try:
            await self._asking
        except asyncio.CancelledError:
            if not self.told:
                raise
        finally:
            watching.cancel()
            for number in stopping.HEARD:
                loop.remove_signal_handler(number)
        if self._errors:
            raise self._errors[0]
        return self.told

    async def _ask_all(self) -> None:
        with contextlib.ExitStack() as stack:
            for run in self.runs:
                run.open(stack, self.display.say)
            theirs = [run for run in self.runs if run.source.config.url]
            for run in theirs:  # all of them, before any is asked
                if run.needs_server:
                    await run.look(run.endpoints(), self.display.say)
            self._is_looking = False
            await asyncio.gather(*map(self._one, theirs), self._one_after_the_other())

    async def _one_after_the_other(self) -> None:
        for run in self.runs:
            if not run.source.config.url:
                await self._one(run)

    async def _one(self, run: SourceRun) -> None:
        """One source; what goes wrong with it does not keep the others from going on."""
        try:
            await run.ask(self.display)
        except (UserError, OSError) as error:
            self._errors.append(error)
            if len(self.runs) > 1:
                self.display.say(f"{run.source.name} stopped, the other sources go on: {error}")

    async def _watch(self) -> None:
        while True:
            self.display.update()
            await asyncio.sleep(1.0)

    def _signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.told and time.monotonic() - self._told_at > stopping.SAME_SIGNAL_S:
            self.display.say(f"{name} again: what is under way is given up")
            self._asking.cancel()
        else:
            self._stop(name)

    def _stop(self, why: str) -> None:
        if self.told:
            return
        self.told, self._told_at = why, time.monotonic()
        self.display.say(f"{why}: up to {self.config.grace:g} s for what is under way; once more ends at once")
        for run in self.runs:
            run.stop()
        if self._is_looking:
            self._asking.cancel()
