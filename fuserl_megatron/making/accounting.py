"""Rows that are made over hours and days, each exactly once: what is expected, what is there, what is left.

The contract, for whoever makes rows (`fuserl sample` its answers, `fuserl score` its rewards):

    plan = Plan(settings=..., notes=...)            # settings: all that changes a row; notes: what may change
    keys = key_array(key_of("...", ...) for ...)    # parts.py: one per expected row, in the order of reading them later
    with Account(directory, plan, keys) as account: # locks, refuses another plan, cuts a torn last line, reads the keys
        for i in account.missing():                 # positions in `keys` without a row
            account.append(i, {...})                # or account.fail(i, {...}): no row, with the reason
        account.finish({...})                       # done.json, the last file; `finished.py` reads the rows

A row counts from the moment its line is written. Call `sync` once a second (it may run in another thread): what a
power failure takes is made again. A directory holds plan.json, part-00000.jsonl and so on, failures.jsonl (of the last
run only), order.npy and done.json. A million rows take about 100 MB of memory and 2 s to open.
"""

import contextlib
import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fuserl_megatron.config.keys import leaves
from fuserl_megatron.making.parts import PREFIX, num_parts, part_file, read_places, scan
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import file_sha256, sync_path, write_file
from fuserl_megatron.util.json_files import read_json
from fuserl_megatron.util.locks import only_writer
from fuserl_megatron.util.text import show

PART_BYTES = 64 * 2**20
"""A part takes no further row from this size on."""
CHUNK = 2**16
"""Keys looked up at one time."""
PLAN, DONE, ORDER, FAILURES = "plan.json", "done.json", "order.npy", "failures.jsonl"


@dataclass(frozen=True)
class Plan:
    """What a directory of rows is about."""

    settings: Mapping[str, Any]
    """Everything that changes a row; a directory belongs to one value of it for ever."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What is worth knowing and may change from run to run."""

    @property
    def id(self) -> str:
        """Hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


class Account:
    """The rows of one directory, with its lock held. A context manager; see the head of this file.

    Attributes:
        have: [expected] whether there is a row.
        failed: [expected] whether `fail` was called for it in this run.
        extra: rows of the plan that are not expected now, such as of a prompt that was taken out. They stay, unread.
        torn: what was cut off at the start, in words; empty for nothing.
    """

    def __init__(self, directory: str | Path, plan: Plan, keys: np.ndarray):
        self.directory, self.plan, self.keys = Path(directory), plan, keys
        self.have, self.failed = np.zeros(len(keys), bool), np.zeros(len(keys), bool)
        self.extra, self.torn = 0, ""
        self._places = np.zeros((len(keys), 4), np.int64)
        self._part, self._line, self._size = 0, 0, 0
        self._file: io.FileIO | None = None
        self._failures: io.FileIO | None = None
        self._syncing = threading.Lock()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Account":
        with contextlib.ExitStack() as stack:
            lock = only_writer(self.directory / ".lock", self.directory, "choose another output")
            stack.enter_context(lock)
            check_plan(self.directory, self.plan)
            self._read()
            stack.callback(self._close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def is_finished(self) -> bool:
        """Whether nothing is to be done: finished before, and every expected row is there or known to have failed."""
        done = read_json(self.directory / DONE) if (self.directory / DONE).exists() else None
        there = int(self.have.sum())
        return done is not None and done["keys_sha256"] == self._keys_sha256() and there == done["rows"]

    def missing(self) -> np.ndarray:
        """Positions of the expected keys that have no row yet."""
        return np.flatnonzero(~self.have)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The expected rows that are there, in their order."""
        return (json.loads(line) for _, line in read_places(self.directory, self._read_order()))

    def begin(self) -> None:
        """Before the first row: note the plan, take an earlier done.json away, begin failures.jsonl anew."""
        for name in (DONE, ORDER, FAILURES):
            (self.directory / name).unlink(missing_ok=True)
        write_plan(self.directory, self.plan)
        self._failures = open(self.directory / FAILURES, "ab", buffering=0)  # noqa: SIM115
        self._open_part()

    def append(self, i: int, row: Mapping[str, Any]) -> None:
        """Write the row of `keys[i]`.

        Raises:
            UserError: the disk is full or fails; nothing of the row stays.
            ValueError: there is one already, or it holds what JSON cannot.
        """
        if self.have[i]:
            raise ValueError(f"row {i} is there already")
        if self._file is None:
            self.begin()
        elif self._size >= PART_BYTES:
            self._next_part()
        line = PREFIX + self._key(i).encode() + b'",' + _json(row)[1:] + b"\n"
        self._write(line)
        self._line += 1
        self._places[i] = (self._part, self._line, self._size, len(line))
        self._size += len(line)
        self.have[i], self.failed[i] = True, False

    def fail(self, i: int, why: Mapping[str, Any]) -> None:
        """Note in failures.jsonl why `keys[i]` gets no row in this run. The next run tries it again."""
        if self._failures is None:
            self.begin()
        assert self._failures is not None
        self._failures.write(PREFIX + self._key(i).encode() + b'",' + _json(why)[1:] + b"\n")
        self.failed[i] = True

    def sync(self) -> None:
        """Bring what is written to the disk. May be called from another thread than `append`."""
        with self._syncing:
            for file in (self._file, self._failures):
                if file is not None:
                    os.fsync(file.fileno())

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write order.npy and done.json, in this order; `facts` go into the latter, which is returned.

        Raises:
            ValueError: an expected row is neither there nor failed.
        """
        if not (self.have | self.failed).all():
            raise ValueError(f"{int((~(self.have | self.failed)).sum())} rows are neither there nor failed")
        if self._file is None:
            self.begin()
        self.sync()
        parts = []
        for number in range(self._part + 1):
            file = part_file(self.directory, number)
            parts.append({"name": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)})
        places = self._read_order()
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(places))
        content = places.data.cast("B") if len(places) else memoryview(b"")  # np.save would copy it
        write_file(self.directory / ORDER, [head.getvalue(), content])
        counts = {"rows": int(self.have.sum()), "expected": len(self.keys), "failed": int(self.failed.sum())}
        about = {"plan_id": self.plan.id, "keys_sha256": self._keys_sha256(), **counts, "extra": self.extra}
        done = {**about, "finished": now(), **facts, "parts": parts}
        write_file(self.directory / DONE, [json.dumps(done, indent=2).encode() + b"\n"])
        sync_path(self.directory)
        return done

    def _read_order(self) -> np.ndarray:
        return self._places if self.have.all() else self._places[self.have]

    def _read(self) -> None:
        found = scan(self.directory)
        if found.torn:
            file, whole, cut = found.torn
            os.truncate(file, whole)
            sync_path(file)
            self.torn = f"{file}: its last line was not whole: {cut} bytes cut off, the row is made again"
        if len(self.keys) and len(found.keys):
            order = np.argsort(self.keys, kind="stable")
            for start in range(0, len(found.keys), CHUNK):
                keys = found.keys[start : start + CHUNK]
                at = np.minimum(np.searchsorted(self.keys, keys, sorter=order), len(order) - 1)
                position = order[at]
                expected = self.keys[position] == keys
                self.have[position[expected]] = True
                self._places[position[expected]] = found.places[start : start + CHUNK][expected]
        self.extra = len(found.keys) - int(self.have.sum())
        self._part = max(num_parts(self.directory) - 1, 0)
        self._line = int((found.places[:, 0] == self._part).sum())

    def _next_part(self) -> None:
        assert self._file is not None
        with self._syncing:
            os.fsync(self._file.fileno())
            self._file.close()
            self._part += 1
            self._open_part()

    def _open_part(self) -> None:
        file = part_file(self.directory, self._part)
        self._file = open(file, "ab", buffering=0)  # noqa: SIM115
        self._size = os.fstat(self._file.fileno()).st_size
        self._line = self._line if self._size else 0
        sync_path(self.directory)

    def _write(self, line: bytes) -> None:
        assert self._file is not None
        written = 0
        try:
            while written < len(line):  # a full disk takes the beginning of a line
                written += os.write(self._file.fileno(), line[written:])
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._size)
            what = f"{self.directory}: cannot be written ({error.strerror})"
            raise UserError(f"{what}; make room and type the same command again: nothing is lost") from None

    def _key(self, i: int) -> str:
        return self.keys[i : i + 1].tobytes().hex()  # a scalar would lose trailing zero bytes

    def _keys_sha256(self) -> str:
        return hashlib.sha256(self.keys.tobytes()).hexdigest()

    def _close(self) -> None:
        for file in (self._file, self._failures):
            if file is not None:
                os.fsync(file.fileno())
                file.close()
        self._file = self._failures = None


def check_plan(directory: Path, plan: Plan) -> None:
    """Refuse to go on with another plan in the same directory.

    Raises:
        UserError: one line with what differs.
    """
    file = directory / PLAN
    if not file.exists():
        if num_parts(directory):
            raise UserError(
                f"{file}: missing, but there are rows; nobody knows what they are of: choose another output"
            )
        return
    there = read_json(file, advice="choose another output")
    if there.get("plan_id") == plan.id:
        return
    old, new = dict(leaves(there.get("settings", {}))), dict(leaves(json.loads(json.dumps(plan.settings))))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    shown = ", ".join(f"{name} {show(old.get(name))} there, {show(new.get(name))} here" for name in changed[:3])
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise UserError(f"{directory}: holds rows of another plan ({shown}{more}); choose another output")


def write_plan(directory: Path, plan: Plan) -> None:
    """Write plan.json; a directory that has it may be continued."""
    content = {"plan_id": plan.id, "settings": dict(plan.settings), "notes": dict(plan.notes)}
    write_file(directory / PLAN, [json.dumps(content, indent=2).encode() + b"\n"])


def now() -> str:
    """The time as it is written into files."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _json(row: Mapping[str, Any]) -> bytes:
    """One line; half a surrogate, which JSON allows and UTF-8 does not, stays escaped."""
    text = json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")
