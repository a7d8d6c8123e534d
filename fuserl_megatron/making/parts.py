"""Part files of rows: append-only JSONL whose lines begin with their key, read back by that alone."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fuserl_megatron.util.errors import UserError

PREFIX = b'{"key":"'
KEY_END = len(PREFIX) + 32
MOST_OPEN = 200
"""Files at one time."""


def key_of(*what: Any) -> bytes:
    """The 16 bytes that name a row: a hash of everything that makes it this one (texts, whole numbers, tuples)."""
    return hashlib.sha256(ascii(what).encode()).digest()[:16]


def key_array(keys: Iterable[bytes]) -> np.ndarray:
    """Keys as one array [rows] of 16 bytes each, in their order."""
    joined = bytearray()
    for key in keys:
        joined += key
    return np.frombuffer(joined, "S16")


@dataclass
class Scan:
    """The rows in the parts of a directory."""

    keys: np.ndarray
    """[rows] of 16 bytes."""
    places: np.ndarray
    """[rows, 4]: part, line (from 1), first byte, bytes."""
    torn: tuple[Path, int, int] | None
    """The newest part, if its last line is not whole: file, whole bytes, bytes behind them."""


def part_file(directory: Path, number: int) -> Path:
    """The name of a part."""
    return directory / f"part-{number:05d}.jsonl"


def num_parts(directory: Path) -> int:
    """How many parts there are; they are numbered from 0."""
    numbers = sorted(int(file.stem[5:]) for file in directory.glob("part-*.jsonl") if file.stem[5:].isdecimal())
    if numbers != list(range(len(numbers))):
        lost = next(i for i, number in enumerate(numbers) if i != number)
        raise UserError(f"{part_file(directory, lost)}: missing, later parts are there; put it back")
    return len(numbers)


def scan(directory: Path) -> Scan:
    """Read the keys of all rows. Changes nothing.

    Raises:
        UserError: a line that is no row before the newest part's last one, or a key that stands twice.
    """
    found, places, torn = bytearray(), array("q"), None
    parts = num_parts(directory)
    for part in range(parts):
        file, hexadecimal, start, bad = part_file(directory, part), bytearray(), 0, None
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line[:8] != PREFIX or line[KEY_END : KEY_END + 2] != b'",' or line[-2:] != b"}\n":
                    bad = bad or (number, start)
                elif bad:
                    break  # whole rows behind it: no torn end
                else:
                    hexadecimal += line[8:KEY_END]
                    places.extend((part, number, start, len(line)))
                start += len(line)
            else:
                size = start
                if bad and part == parts - 1:
                    torn, bad = (file, bad[1], size - bad[1]), None
        if bad:
            raise UserError(f"{file}:{bad[0]}: not a row of this command; take the line out, and it is made again")
        try:
            keys = bytes.fromhex(hexadecimal.decode("ascii"))
        except ValueError:
            keys = b""
        if len(keys) * 2 != len(hexadecimal):  # fromhex lets white space pass
            raise UserError(f"{file}: holds a row whose key is not 32 hexadecimal digits; it was edited or is damaged")
        found += keys
    scanned = Scan(np.frombuffer(found, "S16"), np.frombuffer(places, np.int64).reshape(-1, 4), torn)
    _refuse_duplicates(directory, scanned)
    return scanned


def read_places(directory: Path, places: np.ndarray) -> Iterator[tuple[tuple[str, int], bytes]]:
    """((file, line), line) of the rows at `places` [rows, 4], in their order."""
    opened: dict[int, int] = {}
    try:
        for part, line, start, length in (map(int, place) for place in places):
            if part not in opened:
                if len(opened) >= MOST_OPEN:
                    os.close(opened.pop(next(iter(opened))))
                opened[part] = os.open(part_file(directory, part), os.O_RDONLY)
            yield (str(part_file(directory, part)), line), os.pread(opened[part], length, start)
    finally:
        for handle in opened.values():
            os.close(handle)


def _refuse_duplicates(directory: Path, scanned: Scan) -> None:
    in_order = np.sort(scanned.keys)
    if not (in_order[1:] == in_order[:-1]).any():
        return
    order = np.argsort(scanned.keys, kind="stable")
    same = np.flatnonzero(scanned.keys[order[1:]] == scanned.keys[order[:-1]])
    first, second = (scanned.places[order[same[0] + i]] for i in (0, 1))
    one, two = (f"{part_file(directory, p[0])}:{p[1]}" for p in (first, second))
    more = f" ({len(same)} such rows)" if len(same) > 1 else ""
    raise UserError(f"{two}: the same row as {one}{more}; take one of the lines out")
