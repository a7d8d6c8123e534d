"""The rows of one file or hub data set, as a stream of (place, raw line or row)."""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fuserl_megatron.records.inputs import FIELDS, IGNORED_FIELDS, Place
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.named import load_named
from fuserl_megatron.util.text import first_line

Needed = Sequence[str] | Callable[[Sequence[str]], Sequence[str]]
"""Columns that a table must have, or a function of those it has."""
Reader = Callable[[str], Iterable[tuple[int, dict[str, Any]]]]
"""A user's own: a file's name -> (line, row or whatever says where it is, from 1; the record), one by one."""


def reader_of(name: str | None) -> Reader | None:
    """The reader that the setting `reader` names; None for the package's own. UserError where there is none."""
    if name is None:
        return None
    if not callable(reader := load_named(name, "reader")):
        raise UserError(f"reader={name}: is no function (docs/extending.md)")
    return reader


def rows(
    name: str, needed: Needed = FIELDS, unread: Sequence[str] = IGNORED_FIELDS, reader: Reader | None = None
) -> Iterator[tuple[Place, bytes | dict[str, Any]]]:
    """Raw lines of a JSONL file (blank ones left out), rows of any other file or of a hub data set, or what a reader
    of the user's own finds.

    Of a table the columns `needed` must be there, and those in `unread` are left out where that saves time.
    """
    if reader is not None:
        yield from _own_rows(name, reader)
    elif not os.path.exists(name):
        yield from _hub_rows(name, needed)
    elif name.endswith(".parquet"):
        yield from _parquet_rows(name, needed, unread)
    elif name.endswith(".arrow"):
        yield from _arrow_rows(name, needed)
    elif name.endswith(".csv"):
        yield from _csv_rows(name, needed)
    elif name.endswith(".json") and (found := _json_list(name)) is not None:
        for number, row in enumerate(found, 1):
            yield (name, number), row if isinstance(row, dict) else json.dumps(row).encode()
    else:
        try:
            with gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield (name, number), line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{name}: not a complete gzip file ({error}): copy or compress it again") from None


def _json_list(name: str) -> list[Any] | None:
    """What a file holds that is one JSON list; None for one object a line."""
    with open(name, "rb") as file:
        if not file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return None
        file.seek(0)
        try:
            return json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: not a JSON list ({first_line(error)}); correct it, or write JSONL") from None


def _own_rows(name: str, reader: Reader) -> Iterator[tuple[Place, dict[str, Any]]]:
    number = 0
    try:
        for number, record in reader(name):
            if not isinstance(number, int) or not isinstance(record, dict):
                raise TypeError("it must yield (number, record), a whole number and a dict")
            yield (name, number), record
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # whatever the user's function raises
        where = f"{name}, after {number}" if number else name
        raise UserError(f"{where}: the reader fails with {type(error).__name__}: {first_line(error)}") from error


def _parquet_rows(name: str, needed: Needed, unread: Sequence[str]) -> Iterator[tuple[Place, bytes | dict[str, Any]]]:
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


def _arrow_rows(name: str, needed: Needed) -> Iterator[tuple[Place, bytes | dict[str, Any]]]:
    """Arrow's stream (what `datasets` keeps) or file format."""
    import pyarrow

    try:
        with pyarrow.OSFile(name, "rb") as file:
            start = file.read(6)
            file.seek(0)
            opened = pyarrow.ipc.open_file(file) if start == b"ARROW1" else pyarrow.ipc.open_stream(file)
            _check_columns(name, opened.schema.names, needed)
            count = getattr(opened, "num_record_batches", None)
            batches = iter(opened) if count is None else (opened.get_batch(i) for i in range(count))
            number = 0
            for batch in batches:
                for row in _python_rows(batch):
                    number += 1
                    yield (name, number), row
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{name}: not a readable Arrow file ({first_line(error)})") from None


def _csv_rows(name: str, needed: Needed) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Cells are text; empty ones are left out."""
    import csv

    csv.field_size_limit(2**31 - 1)
    try:
        with open(name, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            _check_columns(name, table.fieldnames or (), needed)
            for row in table:
                if None in row or None in row.values():
                    raise csv.Error(f"line {table.line_num}: not as many cells as the first line has")
                yield (name, table.line_num), {key: value for key, value in row.items() if value != ""}
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not a readable CSV file ({first_line(error)})") from None


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


def _hub_rows(name: str, needed: Needed) -> Iterator[tuple[Place, dict[str, Any]]]:
    import datasets

    hub_name, _, split = name.partition(":")
    try:
        table = datasets.load_dataset(hub_name, split=split or "train")
    except MemoryError:  # no fault of the files
        raise
    except Exception as error:  # the hub client raises a dozen unrelated classes; all mean that there is no data
        what = f"no file of that name here, and the hub gave no data set ({first_line(error)})"
        raise UserError(f"{name}: {what}; without a network connection give a local file") from None
    _check_columns(name, table.column_names, needed)
    for number, row in enumerate(table, 1):
        yield (name, number), row


def _check_columns(name: str, columns: Sequence[str], needed: Needed) -> None:
    for twice in sorted({c for c in columns if columns.count(c) > 1}):
        raise UserError(f"{name}: column {twice!r} is there twice: rename or drop one")
    needed = needed(columns) if callable(needed) else needed
    for field in needed:
        if field not in columns:
            have = ", ".join(columns)
            raise UserError(f"{name}: column {field!r} is missing (columns: {have}): needs {', '.join(needed)}")
