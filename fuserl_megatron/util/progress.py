"""A progress bar for work that a person waits for."""

import sys
import time
from collections.abc import Iterable, Iterator

SHOW_AFTER = 2.0
"""Seconds before a bar appears: short work shows none."""
REFRESH_EVERY = 64
"""Items between two looks at the clock."""


def watched(items: Iterable, total: int | None, text: str, progress: bool) -> Iterator:
    """The items, with a progress bar for a person who has waited long enough."""
    if not (progress and sys.stderr.isatty()):
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(text, total=total)
    started, shown = time.monotonic(), False
    try:
        for i, item in enumerate(items):
            yield item
            if not shown and i % REFRESH_EVERY == 0 and time.monotonic() - started > SHOW_AFTER:
                bar.start()
                shown = True
            if shown and i % REFRESH_EVERY == 0:
                bar.update(task, completed=i + 1)
    finally:
        if shown:
            bar.stop()
