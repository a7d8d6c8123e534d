"""How far a run of sampling is: a bar for each source where a person watches, else a line a minute, and a small file
that `fuserl sample --status` reads from another shell."""

import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from fuserl_megatron.making.client import Client
from fuserl_megatron.making.sample_report import share

PROGRESS = "progress.json"
FILE_EVERY_S = 5.0
LINE_EVERY_S = 60.0
WINDOW_S = 30.0
"""Rates are those of the last half minute."""


class Pace:
    """One source's progress, with its rates.

    Attributes:
        expected: answers in all.
        there: how many of them the files held at the start.
    """

    def __init__(self, name: str, expected: int, there: int, client: Client):
        self.name, self.expected, self.there, self.client = name, expected, there, client
        self._past: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])

    def look(self) -> dict[str, Any]:
        """The figures of now."""
        stats, moment = self.client.stats, time.monotonic()
        self._past.append((moment, stats.answers, stats.tokens))
        while len(self._past) > 2 and moment - self._past[0][0] > WINDOW_S:
            self._past.popleft()
        since, answers, tokens = self._past[0]
        elapsed = max(moment - since, 1e-3)
        failed = stats.failed.total()
        done = self.there + stats.answers
        rate = (stats.answers - answers) / elapsed
        return {
            "done": done,
            "expected": self.expected,
            "tokens_per_second": round((stats.tokens - tokens) / elapsed, 1),
            "in_flight": self.client.in_flight,
            "waiting": self.client.waiting,
            "failed": failed,
            "cut": share(stats.cut, stats.answers),
            "eta": None if not rate else round((self.expected - done - failed) / rate),
        }


def line_of(now: dict[str, Any]) -> str:
    """The figures in words."""
    waits = f", {now['waiting']} to try again" if now["waiting"] else ""
    eta = "" if now["eta"] is None else f", {duration(now['eta'])} left"
    return (
        f"{now['done']:,}/{now['expected']:,} answers, {now['tokens_per_second']:,.0f} tokens/s, "
        f"{now['in_flight']} in flight{waits}, {now['failed']} failed, {now['cut']} cut{eta}"
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Display:
    """All sources of a run. A context manager; `update` is called about once a second."""

    def __init__(self, output: Path):
        self.output = output
        self.paces: dict[str, Pace] = {}
        self._tasks: dict[str, Any] = {}
        self._bar: Any = None
        self._over: set[str] = set()
        self._lines_at, self._files_at = time.monotonic(), 0.0

    def __enter__(self) -> "Display":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[words]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line, above the bars."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def watch(self, pace: Pace) -> None:
        """Show one more source."""
        self.paces[pace.name] = pace
        if self._bar is not None:
            self._tasks[pace.name] = self._bar.add_task(pace.name, total=pace.expected, words="")

    def update(self) -> None:
        """Show and note the figures of now."""
        moment = time.monotonic()
        write, speak = moment - self._files_at >= FILE_EVERY_S, moment - self._lines_at >= LINE_EVERY_S
        for name, pace in self.paces.items():
            if name in self._over:
                continue
            now = pace.look()
            if self._bar is not None:
                self._bar.update(self._tasks[name], completed=now["done"], words=line_of(now))
            elif speak:
                self.say(f"{name}: {line_of(now)}")
            over = now["done"] + now["failed"] >= now["expected"]
            if write or over:
                write_progress(self.output / name, now)
            if over:
                self._over.add(name)
        self._files_at = moment if write else self._files_at
        self._lines_at = moment if speak else self._lines_at


def write_progress(directory: Path, now: dict[str, Any]) -> None:
    """For --status. It is read, never relied on, so it is not brought to the disk."""
    partial = directory / f"{PROGRESS}.partial"
    partial.write_text(json.dumps(now | {"time": time.time()}))
    os.replace(partial, directory / PROGRESS)
