"""Reading what an `Account` has finished: every expected row once, in the order in which rows were asked for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fuserl_megatron.making.accounting import DONE, ORDER, PLAN
from fuserl_megatron.making.parts import read_places
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import read_json

SHARD = "shard-"


def account_directories(directory: str | Path, all_shards: bool = True) -> list[Path]:
    """The directories with a plan.json: this one, or those in it, by name; of a source in shards each shard's.

    Raises:
        UserError: there is none, or with `all_shards` one of a source's is missing.
    """
    top = Path(directory)
    if (top / PLAN).is_file():
        return [top]
    patterns = (f"*/{PLAN}", f"{SHARD}*/{PLAN}", f"*/{SHARD}*/{PLAN}")
    found = sorted({file.parent for pattern in patterns for file in top.glob(pattern)})
    if not found:
        what = "no such directory" if not top.exists() else f"no {PLAN} in it or in its folders"
        raise UserError(f"{top}: {what}: not written by `fuserl sample` or `fuserl score`")
    for parent in sorted({path.parent for path in found if path.name.startswith(SHARD)}) if all_shards else ():
        there = [path.name for path in found if path.parent == parent]
        wanted = shard_names(int(there[0].rpartition("-")[2]))
        if missing := [name for name in wanted if name not in there]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{parent}: {missing[0]}{more} is not begun; sample all of its shards first")
    return found


def shard_names(count: int) -> list[str]:
    """The folders of a source that is sampled in so many parts."""
    return [f"{SHARD}{number:04d}-of-{count:04d}" for number in range(count)]


def read_plan(directory: Path) -> dict[str, Any]:
    """plan.json: plan_id, settings, notes."""
    return read_json(directory / PLAN)


def read_done(directory: Path) -> dict[str, Any]:
    """done.json of a finished directory.

    Raises:
        UserError: it is unfinished, or a part was changed since.
    """
    if not (directory / DONE).is_file():
        raise UserError(f"{directory}: not finished (no {DONE}); type the command that made it again: it goes on")
    done = read_json(directory / DONE)
    for part in done["parts"]:
        size = (directory / part["name"]).stat().st_size if (directory / part["name"]).is_file() else None
        if size != part["bytes"]:
            found = "missing" if size is None else f"{size} bytes, not {part['bytes']}"
            raise UserError(f"{directory / part['name']}: {found}: it was changed after the end")
    return done


def finished_lines(directory: Path) -> Iterator[tuple[tuple[str, int], bytes]]:
    """((file, line), line) of every row that was expected, in their order. Holds 32 bytes a row, no texts.

    Raises:
        UserError: as of `read_done`.
    """
    if not read_done(directory)["rows"]:  # an array of no length cannot be mapped
        return
    yield from read_places(directory, np.load(directory / ORDER, mmap_mode="r"))


def finished_rows(directory: Path) -> Iterator[dict[str, Any]]:
    """The rows themselves.

    Raises:
        UserError: as of `read_done`, or a line that is damaged.
    """
    for (file, number), line in finished_lines(directory):
        try:
            yield json.loads(line)
        except ValueError:
            raise UserError(f"{file}:{number}: not JSON: the file is damaged") from None
