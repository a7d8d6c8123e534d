"""What `fuserl score --dry-run` and `--status` say: from the settings and the files alone, nothing is written."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fuserl_megatron.config.score_sections import Reward, ScoreConfig
from fuserl_megatron.making.accounting import DONE, PLAN
from fuserl_megatron.making.answers import count_flags
from fuserl_megatron.making.join import RECORDS
from fuserl_megatron.making.parts import scan
from fuserl_megatron.making.score import REWARDS, prepare
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import read_json


def dry_run(config: ScoreConfig, rewards: Mapping[str, Reward]) -> list[str]:
    """What a run would do, in lines. Opens no reward and writes nothing."""
    prepared = prepare(config, rewards)
    flags = count_flags(prepared.table)
    table = prepared.table
    lines = [f"{len(table.keys):,} answers to {table.num_prompts:,} prompts from {len(table.sources)} sources"]
    lines.append(", ".join(f"{name} {number:,}" for name, number in flags.items()))
    lines.append(f"to score: {int(prepared.keep.sum()):,}" + _left_out(prepared.dropped))
    for name, reward in prepared.rewards.items():
        there, seconds = _progress(prepared.directories[name], table.keys[prepared.keep])
        left = int(prepared.keep.sum()) - there
        took = f", about {left * seconds:,.0f} s at the speed so far" if seconds and left else ""
        lines.append(f"reward {name} ({reward.kind}): {there:,} have a value or a reason, {left:,} to do{took}")
    return lines


def status(config: ScoreConfig) -> list[str]:
    """How far a run is, in lines, from its files alone; may be asked while it runs."""
    output = Path(config.output)
    if not (output / REWARDS).is_dir():
        raise UserError(f"output={output}: nothing is scored there yet")
    lines = []
    for directory in sorted((output / REWARDS).iterdir()):
        if not (directory / PLAN).is_file():
            lines.append(f"reward {directory.name}: not begun")
            continue
        done = read_json(directory / DONE) if (directory / DONE).is_file() else None
        rows, answers = len(scan(directory).keys), read_json(directory / PLAN)["notes"].get("answers", 0)
        lines.append(f"reward {directory.name}: {rows:,} of {answers:,}, {'finished' if done else 'not finished'}")
    done = read_json(output / DONE) if (output / DONE).is_file() else None
    lines.append(f"{RECORDS}: {done['records']:,} records" if done else f"{RECORDS}: not joined yet")
    return lines


def _progress(directory: Path, keys: np.ndarray) -> tuple[int, float | None]:
    """How many of the keys have a row, and the seconds that one took."""
    if not (directory / PLAN).is_file():
        return 0, None
    there = int(np.isin(keys, scan(directory).keys).sum())
    done = read_json(directory / DONE) if (directory / DONE).is_file() else {}
    return there, done["seconds"] / done["scored"] if done.get("scored") else None


def _left_out(dropped: Mapping[str, int]) -> str:
    words = ", ".join(f"{name} {number:,}" for name, number in dropped.items() if number)
    return f" (left out: {words})" if words else ""
