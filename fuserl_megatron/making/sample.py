"""`fuserl sample`: n answers of every source to every prompt, each exactly once, however often it is interrupted."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fuserl_megatron.config.sample_sections import SampleConfig, SourceConfig
from fuserl_megatron.making.accounting import DONE
from fuserl_megatron.making.answers import heldout_marks, marks
from fuserl_megatron.making.conductor import conduct
from fuserl_megatron.making.finished import account_directories
from fuserl_megatron.making.prompts import Prompt, PromptList
from fuserl_megatron.making.sample_report import table, write_html
from fuserl_megatron.making.sample_run import SampleRun
from fuserl_megatron.making.servers import check_program
from fuserl_megatron.making.sources import Source
from fuserl_megatron.runtime import stopping
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import read_json
from fuserl_megatron.util.locks import only_writer


def sample(config: SampleConfig, sources: list[SourceConfig]) -> int:
    """Run until everything is there, or until a signal; returns the exit code.

    Raises:
        UserError: something the user can put right. What came until then is kept.
    """
    need_aiohttp()
    output = Path(config.output)
    stopping.remove_marker(output)
    done: dict[str, dict[str, Any]] = {}
    for shard in shards_of(config):
        runs = open_runs(config, sources, shard)
        told = conduct(config, runs)
        done |= {run.name: run.done for run in runs if run.done is not None}
        if told:
            stopping.ask_for_more(output, f"stopped by {told}; everything that was answered is kept")
            break
    if done:
        print(*table(done), sep="\n", flush=True)
        with only_writer(output / ".report.lock", output / "report.html", "type the same command again"):
            write_html(output / "report.html", finished_runs(output))
        if len(done) == len(sources) * len(shards_of(config)):
            print(f"written: {output} (report.html has the figures)", flush=True)
    return 0


def finished_runs(output: Path) -> dict[str, dict[str, Any]]:
    """done.json of every source and shard in a directory that is finished, also by jobs of their own, by name."""
    there = account_directories(output, all_shards=False)
    files = {str(directory.relative_to(output)): directory / DONE for directory in there}
    return {name: read_json(file) for name, file in files.items() if file.is_file()}


def shards_of(config: SampleConfig, environ: Mapping[str, str] = os.environ) -> list[int]:
    """The parts that this process samples.

    Raises:
        UserError: the task's number in the array job is none of them.
    """
    if config.shards == 1 or config.shard is not None:
        return [config.shard or 0]
    task = environ.get("SLURM_ARRAY_TASK_ID", "")
    if not task:
        return list(range(config.shards))
    if int(task) >= config.shards:
        raise UserError(f"shards={config.shards}: this is task {task} of the array; --array=0-{config.shards - 1} fits")
    return [int(task)]


def need_aiohttp(command: str = "sample") -> None:
    """Raises UserError where the client's library is missing."""
    if importlib.util.find_spec("aiohttp") is None:
        raise UserError(f"fuserl {command} needs aiohttp: pip install 'fuserl-megatron[sample]'")


def check_sources(sources: Sequence[SourceConfig]) -> None:
    """Raises UserError where the program that starts a source's server is not there."""
    for source in sources:
        if not source.url:
            check_program(source)


def open_runs(config: SampleConfig, sources: list[SourceConfig], shard: int = 0) -> list[SampleRun]:
    """Read the prompts of a shard and prepare a run for each source. Writes nothing.

    Raises:
        UserError: prompts or demonstrations that cannot be used, or a key that is not in the environment.
    """
    asked = [Source(source) for source in sources]
    check_sources(sources)

    def refuse(prompt: Prompt) -> str | None:
        return next((why for source in asked if (why := source.refuse(prompt.messages))), None)

    known = heldout_marks(config.heldout, config.heldout_ngram) if config.heldout else set()
    num_overlapping = 0

    def is_left_out(prompt: Prompt) -> bool:
        nonlocal num_overlapping
        overlaps = bool(known) and not known.isdisjoint(marks(prompt.messages, config.heldout_ngram))
        num_overlapping += overlaps
        return overlaps and config.heldout_action == "drop"

    prompts = PromptList(config.prompts, config.on_bad_record, refuse, is_left_out, (shard, config.shards))
    if config.heldout:
        what = "left out" if config.heldout_action == "drop" else "kept (heldout_action=drop leaves them out)"
        print(f"prompts: {num_overlapping:,} overlap with held-out ones: {what}", flush=True)
    for name, count in prompts.counts.items():
        if name.startswith("ignored_"):
            print(f"prompts: field {name.removeprefix('ignored_')!r} of {count:,} rows is not read; put it into meta")
    return [SampleRun(config, source, prompts, shard) for source in asked]
