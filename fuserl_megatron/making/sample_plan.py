"""`fuserl sample --dry-run` and `--status`: what a run would do, and how far one is. Both write nothing."""

import asyncio
import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

from fuserl_megatron.config.sample_sections import SampleConfig, SourceConfig
from fuserl_megatron.making.accounting import DONE
from fuserl_megatron.making.finished import account_directories, read_plan
from fuserl_megatron.making.parts import num_parts, part_file, scan
from fuserl_megatron.making.sample import need_aiohttp, open_runs, shards_of
from fuserl_megatron.making.sample_display import PROGRESS, Display, duration, line_of
from fuserl_megatron.making.sample_run import SampleRun
from fuserl_megatron.making.source_run import RUNS
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import read_json
from fuserl_megatron.util.report_page import columns
from fuserl_megatron.util.whole_directory import size

CHARACTERS_PER_TOKEN = 4
FEW = 1000
"""Rows from which the length of answers is estimated."""
ROW_BYTES = 500
"""Of a row besides its texts."""
FRESH_S = 20.0
"""A progress file younger than this is of a run that goes on."""


def dry_run(config: SampleConfig, sources: list[SourceConfig]) -> int:
    """Read the prompts, look at servers that run, and print what is missing, how much that is and how long it takes.

    Raises:
        UserError: whatever would stop the run before its first answer.
    """
    need_aiohttp()
    shards = [open_runs(config, sources, shard) for shard in shards_of(config)]
    runs = [run for shard in shards for run in shard]
    counts, there = runs[0].prompts.counts, sum(len(shard[0].prompts) for shard in shards)
    print(f"prompts: {there:,} of {counts['rows']:,} rows, {counts['duplicates']:,} duplicates", end="")
    print(f", {counts['skipped']:,} left out")
    display = Display(Path(config.output))
    for run in shards[0]:
        if run.source.config.url:
            asyncio.run(run.look(run.endpoints(), display.say))
        else:
            print(f"{run.source.name}: its server is started by the run: {run.source.config.server.command}")
    rows, needed = [("source", "answers", "there", "missing", "tokens", "tokens/s", "time", "price", "disk")], 0
    for run in runs:
        estimate = _estimate(run)
        needed += estimate["bytes"]
        rows.append((run.name, *estimate["cells"]))
    print(*columns(rows), sep="\n")
    at_most = "tokens: of answers; at most max_tokens each until there are some to measure"
    print(f"{at_most}; time: at the pace of this output's earlier runs")
    existing = next(
        path for path in (Path(config.output).absolute(), *Path(config.output).absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(existing).free
    print(f"disk: needs about {size(needed)}, free {size(free)}{': NOT ENOUGH' if free < needed else ''}")
    return 0


def _estimate(run: SampleRun) -> dict[str, Any]:
    config, directory = run.source.config, run.directory
    expected, there = len(run.prompts) * run.config.n, run.there()
    mean, pace = _measured(directory) if num_parts(directory) else (None, None)
    missing = expected - there
    tokens = round(missing * (mean or config.sampling.max_tokens))
    prompt_characters = run.prompts.num_characters * missing / max(len(run.prompts), 1)
    price = None
    if config.price_input is not None or config.price_output is not None:
        prompt_tokens = prompt_characters / CHARACTERS_PER_TOKEN
        price = (prompt_tokens * (config.price_input or 0) + tokens * (config.price_output or 0)) / 1e6
    return {
        "bytes": round(prompt_characters + tokens * CHARACTERS_PER_TOKEN + missing * ROW_BYTES),
        "cells": (
            f"{expected:,}",
            f"{there:,}",
            f"{missing:,}",
            f"{'' if mean else '<= '}{tokens:,}",
            f"{pace:,.0f}" if pace else "?",
            duration(tokens / pace) if pace else "?",
            "-" if price is None else f"{'' if mean else '<= '}{price:,.2f}",
            size(round(prompt_characters + tokens * CHARACTERS_PER_TOKEN + missing * ROW_BYTES)),
        ),
    }


def _measured(directory: Path) -> tuple[float | None, float | None]:
    """Mean tokens of the answers that are there, and tokens a second of the last run that says so."""
    with open(part_file(directory, 0), "rb") as file:
        tokens = [json.loads(line).get("tokens") for line in itertools.islice(file, FEW) if line.endswith(b"\n")]
    tokens = [count for count in tokens if count]
    paces = []
    if (directory / RUNS).is_file():
        for line in (directory / RUNS).read_text().splitlines():
            paces += [run["tokens_per_second"] for run in [json.loads(line)] if run["answers"]]
    elif (directory / PROGRESS).is_file():
        paces.append(read_json(directory / PROGRESS)["tokens_per_second"])
    return (sum(tokens) / len(tokens) if tokens else None), (paces[-1] if paces and paces[-1] else None)


def status(output: str) -> int:
    """How far the run in a directory is, from its files alone; returns 0 when everything is there, else 1.

    Raises:
        UserError: nothing was sampled there.
    """
    complete = True
    for directory in account_directories(output, all_shards=False):
        plan, name = read_plan(directory), "/".join(directory.parts[len(Path(output).parts) :]) or directory.name
        expected = plan["notes"]["expected"]
        if (directory / DONE).is_file():
            done = read_json(directory / DONE)
            print(f"{name}: complete, {done['rows']:,} answers, {done['failed']:,} failed")
            continue
        complete = False
        there = len(scan(directory).keys)
        words = f"{there:,}/{expected:,} answers"
        if (directory / PROGRESS).is_file():
            now = read_json(directory / PROGRESS)
            age = time.time() - now["time"]
            words = line_of(now) if age < FRESH_S else f"{words}; stopped {duration(age)} ago"
        print(f"{name}: {words}")
    try:
        account_directories(output)
    except UserError as error:  # a shard that nobody has begun
        print(error)
        return 1
    return 0 if complete else 1
