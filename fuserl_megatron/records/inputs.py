"""Where records come from: JSONL files, parquet files, globs and hub data sets, as a stream of (place, raw record)."""

import glob
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import read_json
from fuserl_megatron.util.paths import did_you_mean
from fuserl_megatron.util.text import first_line

FIELDS = ("prompt", "source", "response", "reward")
OPTIONAL_FIELDS = ("source_mean_logps", "tools")
IGNORED_FIELDS = ("meta", "rewards", "key")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?$")

Place = tuple[str, int]
"""Where a record was read: file (or hub name) and line or row, counted from 1."""


def expand_inputs(inputs: Sequence[str], key: str = "inputs") -> list[str]:
    """Files in the order given (a glob's matches sorted) and hub names; each once. `key` is the setting's name.

    Raises:
        UserError: nothing given, a glob without a match, a directory, a file of another kind, no such file.
    """
    if not inputs:
        raise UserError(f"{key} is empty: name at least one .jsonl, .jsonl.gz or .parquet file, glob or hub data set")
    names: list[str] = []
    for item in inputs:
        if os.path.isdir(item):
            if scored := scored_records(item):
                names.append(scored)
                continue
            raise UserError(f"{item} is a directory: give its files, for example '{item.rstrip('/')}/*.jsonl'")
        if os.path.lexists(item):
            matches = [item]
        elif glob.has_magic(item):
            matches = sorted(glob.glob(item, recursive=True))
            if not matches:
                raise UserError(f"{key}: no file matches {item!r} (looked from {os.getcwd()})")
        elif HUB_NAME.match(item) and not item.endswith((*SUFFIXES, ".json", ".csv", ".txt", ".gz")):
            names.append(item)
            continue
        else:
            raise UserError(f"{key}: {item} does not exist{did_you_mean(item)}")
        for match in matches:
            if not os.path.isfile(match):  # one that waits for a writer, or whose target is gone
                raise UserError(f"{key}: {match} is no regular file: name one, or take it out of the glob")
            if not match.endswith(SUFFIXES):
                raise UserError(
                    f"{key}: {match} is not {', '.join(SUFFIXES)}: convert it to one record per line (JSONL)"
                )
        names.extend(matches)
    return list(dict.fromkeys(names))


def scored_records(directory: str) -> str | None:
    """The file of records in a directory that `fuserl score` wrote; None for any other directory.

    Raises:
        UserError: the run is not finished, the file was changed since, or the answers have no rewards yet.
    """
    done, records = os.path.join(directory, "done.json"), os.path.join(directory, "records.jsonl")
    found = read_json(done) if os.path.isfile(done) else {}
    if found.get("format") == "fuserl scored responses":
        size = os.path.getsize(records) if os.path.isfile(records) else None
        if size != found["bytes"]:
            what = "is missing" if size is None else f"has {size} bytes, not {found['bytes']}: it was changed since"
            raise UserError(f"{records} {what}; type the command of `fuserl score` again")
        return records
    if os.path.isdir(os.path.join(directory, "rewards")):
        raise UserError(
            f"{directory}: its scoring is not finished; type the command of `fuserl score` again: it goes on"
        )
    if glob.glob(os.path.join(glob.escape(directory), "*", "plan.json")):
        raise UserError(f"{directory}: answers without rewards; `fuserl score samples={directory} ...` comes first")
    return None


def rows(
    name: str, needed: Sequence[str] = FIELDS, unread: Sequence[str] = IGNORED_FIELDS
) -> Iterator[tuple[Place, bytes | dict[str, Any]]]:
    """Raw lines of a JSONL file (blank ones left out), rows of a parquet file or of a hub data set.

    Of a table the columns `needed` must be there, and those in `unread` are left out where that saves time.
    """
    if not os.path.exists(name):
        yield from _hub_rows(name, needed)
    elif name.endswith(".parquet"):
        yield from _parquet_rows(name, needed, unread)
    else:
        try:
            with gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield (name, number), line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{name}: not a complete gzip file ({error}): copy or compress it again") from None


def _parquet_rows(
    name: str, needed: Sequence[str], unread: Sequence[str]
) -> Iterator[tuple[Place, bytes | dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(name)
        schema = file.schema_arrow
        _check_columns(name, schema.names, needed)
        # no field is a time, and Python's times do not hold all that Arrow's may
        times = [c.name for c in schema if pyarrow.types.is_temporal(c.type) and c.name not in FIELDS]
        empty = dict.fromkeys(times)
        columns = [c for c in schema.names if c not in (*unread, *times)]
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in _python_rows(batch):
                number += 1
                yield (name, number), row | empty if isinstance(row, dict) else row
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{name}: not a readable parquet file ({first_line(error)})") from None


def _python_rows(batch: Any) -> list[bytes | dict[str, Any]]:
    """Rows of a batch; one that Python's types cannot hold (text that is not UTF-8) as bytes that are no record."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        if batch.num_rows == 1:
            import pyarrow

            texts = (batch.column(i) for i, c in enumerate(batch.schema) if pyarrow.types.is_string(c.type))
            return [b" ".join(text.cast(pyarrow.binary())[0].as_py() or b"" for text in texts)]
        return [row for i in range(batch.num_rows) for row in _python_rows(batch.slice(i, 1))]


def _hub_rows(name: str, needed: Sequence[str]) -> Iterator[tuple[Place, dict[str, Any]]]:
    import datasets

    hub_name, _, split = name.partition(":")
    try:
        table = datasets.load_dataset(hub_name, split=split or "train")
    except Exception as error:  # the hub client raises a dozen unrelated classes; all mean that there is no data
        what = f"no file of that name here, and the hub gave no data set ({first_line(error)})"
        raise UserError(f"{name}: {what}; without a network connection give a local file") from None
    _check_columns(name, table.column_names, needed)
    for number, row in enumerate(table, 1):
        yield (name, number), row


def _check_columns(name: str, columns: Sequence[str], needed: Sequence[str]) -> None:
    for twice in sorted({c for c in columns if columns.count(c) > 1}):
        raise UserError(f"{name}: column {twice!r} is there twice: rename or drop one")
    for field in needed:
        if field not in columns:
            have = ", ".join(columns)
            raise UserError(f"{name}: column {field!r} is missing (columns: {have}): needs {', '.join(needed)}")
