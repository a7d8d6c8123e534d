"""Where records come from: JSONL files, parquet files, globs and hub data sets, as a stream of (place, raw record)."""

import glob
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from fuserl_megatron.config.schema import UserError
from fuserl_megatron.config.words import first_line

FIELDS = ("prompt", "source", "response", "reward")
OPTIONAL_FIELDS = ("source_mean_logps", "tools")
IGNORED_FIELDS = ("meta",)
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?$")

Place = tuple[str, int]
"""Where a record was read: file (or hub name) and line or row, counted from 1."""


def expand_inputs(inputs: Sequence[str]) -> list[str]:
    """Files in the order given (a glob's matches sorted) and hub names; each once.

    Raises:
        UserError: nothing given, a glob without a match, a directory, a file of another kind, no such file.
    """
    if not inputs:
        raise UserError("inputs is empty: name at least one .jsonl, .jsonl.gz or .parquet file, glob or hub data set")
    names: list[str] = []
    for item in inputs:
        if os.path.isdir(item):
            raise UserError(f"{item} is a directory: give its files, for example '{item.rstrip('/')}/*.jsonl'")
        if os.path.exists(item):
            matches = [item]
        elif glob.has_magic(item):
            matches = sorted(glob.glob(item, recursive=True))
            if not matches:
                raise UserError(f"inputs: no file matches {item!r} (looked from {os.getcwd()})")
        elif HUB_NAME.match(item) and not item.endswith((*SUFFIXES, ".json", ".csv", ".txt", ".gz")):
            names.append(item)
            continue
        else:
            raise UserError(f"inputs: {item} does not exist")
        for match in matches:
            if not match.endswith(SUFFIXES):
                raise UserError(
                    f"inputs: {match} is not {', '.join(SUFFIXES)}: convert it to one record per line (JSONL)"
                )
        names.extend(matches)
    return list(dict.fromkeys(names))


def rows(name: str) -> Iterator[tuple[Place, bytes | dict[str, Any]]]:
    """Raw lines of a JSONL file (blank ones left out), rows of a parquet file or of a hub data set."""
    if not os.path.exists(name):
        yield from _hub_rows(name)
    elif name.endswith(".parquet"):
        yield from _parquet_rows(name)
    else:
        try:
            with gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield (name, number), line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{name}: not a complete gzip file ({error}): copy or compress it again") from None


def _parquet_rows(name: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(name)
        _check_columns(name, file.schema_arrow.names)
        columns = [c for c in file.schema_arrow.names if c not in IGNORED_FIELDS]
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield (name, number), row
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{name}: not a readable parquet file ({first_line(error)})") from None


def _hub_rows(name: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    import datasets

    hub_name, _, split = name.partition(":")
    try:
        table = datasets.load_dataset(hub_name, split=split or "train")
    except Exception as error:  # the hub client raises a dozen unrelated classes; all mean that there is no data
        what = f"no file of that name here, and the hub gave no data set ({first_line(error)})"
        raise UserError(f"inputs: {name}: {what}; without a network connection give a local file") from None
    _check_columns(name, table.column_names)
    for number, row in enumerate(table, 1):
        yield (name, number), row


def _check_columns(name: str, columns: Sequence[str]) -> None:
    for field in FIELDS:
        if field not in columns:
            have = ", ".join(columns)
            raise UserError(f"{name}: column {field!r} is missing (columns: {have}): needs {', '.join(FIELDS)}")
