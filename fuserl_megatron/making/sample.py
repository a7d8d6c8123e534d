"""`fuserl sample`: n answers of every source to every prompt, each exactly once, however often the run is interrupted.

Sources that run elsewhere are asked side by side; those whose servers we start come one after the other, for each needs
the machine. Every source has a directory of its own (accounting.py), so runs of different sources never share a file.
"""

import asyncio
import contextlib
import importlib.util
import os
import signal
import time
from pathlib import Path

from fuserl_megatron.config.sample_sections import SampleConfig, SourceConfig
from fuserl_megatron.making.answers import heldout_marks, marks
from fuserl_megatron.making.prompts import Prompt, PromptList
from fuserl_megatron.making.sample_display import Display
from fuserl_megatron.making.sample_report import table, write_html
from fuserl_megatron.making.servers import check_program
from fuserl_megatron.making.source_run import SourceRun
from fuserl_megatron.making.sources import Source
from fuserl_megatron.runtime import stopping
from fuserl_megatron.util.errors import UserError

LEAST_S = 30.0
"""Something is done at every start, or a job with too little time would be continued for ever."""


def sample(config: SampleConfig, sources: list[SourceConfig]) -> int:
    """Run until everything is there, or until a signal; returns the exit code.

    Raises:
        UserError: something the user can put right. What came until then is kept.
    """
    need_aiohttp()
    output = Path(config.output)
    stopping.remove_marker(output)
    runs = open_runs(config, sources)
    with Display(output) as display:
        told = asyncio.run(_Conductor(config, runs, display).run())
    done = {run.source.name: run.done for run in runs if run.done is not None}
    if done:
        print(*table(done), sep="\n", flush=True)
        if len(done) == len(runs):
            write_html(output / "report.html", done)
            print(f"written: {output} (report.html has the figures)", flush=True)
    if told and len(done) < len(runs):
        stopping.ask_for_more(output, f"stopped by {told}; everything that was answered is kept")
    return 0


def need_aiohttp() -> None:
    """Raises UserError where the client's library is missing."""
    if importlib.util.find_spec("aiohttp") is None:
        raise UserError("fuserl sample needs aiohttp: pip install 'fuserl-megatron[sample]'")


def open_runs(config: SampleConfig, sources: list[SourceConfig]) -> list[SourceRun]:
    """Read the prompts and prepare a run for each source. Writes nothing.

    Raises:
        UserError: prompts or demonstrations that cannot be used, or a key that is not in the environment.
    """
    asked = [Source(source) for source in sources]
    for source in sources:
        if not source.url:
            check_program(source)

    def refuse(prompt: Prompt) -> str | None:
        return next((why for source in asked if (why := source.refuse(prompt.messages))), None)

    known = heldout_marks(config.heldout, config.heldout_ngram) if config.heldout else set()
    num_overlapping = 0

    def is_left_out(prompt: Prompt) -> bool:
        nonlocal num_overlapping
        overlaps = bool(known) and not known.isdisjoint(marks(prompt.messages, config.heldout_ngram))
        num_overlapping += overlaps
        return overlaps and config.heldout_action == "drop"

    prompts = PromptList(config.prompts, config.on_bad_record, refuse, is_left_out)
    if config.heldout:
        what = "left out" if config.heldout_action == "drop" else "kept (heldout_action=drop leaves them out)"
        print(f"prompts: {num_overlapping:,} overlap with held-out ones: {what}", flush=True)
    for name, count in prompts.counts.items():
        if name.startswith("ignored_"):
            print(f"prompts: field {name.removeprefix('ignored_')!r} of {count:,} rows is not read; put it into meta")
    return [SourceRun(config, source, prompts) for source in asked]


class _Conductor:
    """All sources of a run in one event loop, with the signals."""

    def __init__(self, config: SampleConfig, runs: list[SourceRun], display: Display):
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
