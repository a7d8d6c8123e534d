"""Durable writing: a file appears whole under its name, or not at all."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(file: IO) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Bring a file or a directory, by name, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write beside the target, fsync, rename: the file is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            for piece in pieces:
                file.write(piece)
            sync(file)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
