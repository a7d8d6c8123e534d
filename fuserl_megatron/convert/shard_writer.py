"""Writing sharded safetensors one tensor at a time, in any order and from any number of processes.

All names, shapes and the dtype are known before the first number is, so every file's header, and with it every
tensor's place, is written first. A tensor then goes straight to its place: nothing is collected, and memory holds one
tensor (what the caller hands over) and a small window for the change of dtype. Pipeline stages may write into the same
files at once.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from fuserl_megatron.convert.weight_files import SAFE_INDEX, SAFE_SINGLE, SAFETENSORS_DTYPES
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.tensor_io import WINDOW_BYTES, write_at

DEFAULT_SHARD_BYTES = 5 * 10**9
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class ShardWriter:
    """The weight files of one model directory being written. Several threads may write different tensors at once.

    Args:
        directory: exists and is private to this export.
        shapes: Hugging Face tensor name -> dimensions, in file order (`names.hf_shapes`).
        dtype: of every tensor written.
        max_shard_bytes: tensor bytes per file; a larger tensor gets a file of its own.
        create: lay the files out (one process), or only open those another process has laid out with equal arguments.

    Raises:
        UserError: a file cannot be created, for instance because the disk is full.
    """

    def __init__(
        self,
        directory: str | Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        create: bool = True,
    ) -> None:
        if max_shard_bytes < 1:
            raise UserError(f"max_shard_bytes = {max_shard_bytes} must be at least 1; {DEFAULT_SHARD_BYTES} is usual")
        self.directory, self.dtype, self.shapes = Path(directory), dtype, dict(shapes)
        self.written: set[str] = set()
        self._rows: dict[str, int] = {}
        self._place: dict[str, tuple[Path, int]] = {}
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()
        shards = _shards(self.shapes, dtype, max_shard_bytes)
        single = len(shards) == 1
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = self.directory / (SAFE_SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
            header, starts, size = _header(names, self.shapes, dtype)
            for name, start in starts.items():
                self._place[name] = (file, start)
                weight_map[name] = file.name
            if create:
                with _disk_errors(file), open(file, "xb") as stream:
                    stream.write(header)
                    stream.truncate(size)
        if create and not single:
            index = {"metadata": {"total_size": sum(_bytes(s, dtype) for s in self.shapes.values())}}
            file = self.directory / SAFE_INDEX
            with _disk_errors(file):
                file.write_text(json.dumps(index | {"weight_map": weight_map}, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place, converting its dtype window by window.

        Args:
            name: one of the planned names, not yet written.
            tensor: of the planned shape, any float dtype, on any device.

        Raises:
            UserError: an unplanned or repeated name, another shape, a value float16 cannot hold, or a full disk.
        """
        if name not in self._place:
            raise UserError(
                f"{name}: not among the {len(self.shapes)} tensors the config calls for; nothing is exported"
            )
        if name in self.written:
            raise UserError(f"{name}: written twice; two parts of the model claim the same tensor")
        if tuple(tensor.shape) != self.shapes[name]:
            raise UserError(f"{name}: shape {list(tensor.shape)}, but the config calls for {list(self.shapes[name])}")
        self._put(name, 0, tensor.detach().reshape(tensor.shape or (1,)))
        self.written.add(name)

    def write_rows(self, name: str, first: int, rows: torch.Tensor) -> None:
        """Write some rows of a tensor to their place; it counts as written when as many rows came as it has.

        Args:
            name: one of the planned names.
            first: index of the first row along dimension 0.
            rows: [count, ...] of the planned shape but for dimension 0.

        Raises:
            UserError: as `write`.
        """
        shape = self.shapes.get(name)
        done = self._rows.get(name, 0) + rows.shape[0]
        if shape is None or rows.shape[1:] != shape[1:] or first + rows.shape[0] > shape[0] or done > shape[0]:
            raise UserError(f"{name}: rows {first} to {first + rows.shape[0]} are not missing; nothing is exported")
        self._put(name, first, rows)
        self._rows[name] = done
        if done == shape[0]:
            self.written.add(name)

    def _put(self, name: str, first: int, rows: torch.Tensor) -> None:
        file, offset = self._place[name]
        row_bytes = max(1, math.prod(rows.shape[1:]) * self.dtype.itemsize)
        offset += first * row_bytes
        with _disk_errors(file):
            with self._lock:
                if file not in self._handles:
                    self._handles[file] = os.open(file, os.O_WRONLY)
            for part in rows.split(max(1, WINDOW_BYTES // row_bytes)):
                window = converted(part, self.dtype, name)
                write_at(self._handles[file], offset, window)
                offset += window.nbytes

    def close(self, sync: bool = True) -> set[str]:
        """Close the files, flushed to the device when `sync`; returns the names this process wrote."""
        try:
            for file, handle in self._handles.items():
                if sync:
                    with _disk_errors(file):
                        os.fsync(handle)
        finally:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()
        return self.written

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(sync=kind is None)


def converted(part: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The numbers on the CPU in another dtype, the tensor itself when nothing changes.

    Raises:
        UserError: a finite number becomes infinite in float16.
    """
    window = part.to(device="cpu", dtype=dtype).contiguous()
    if dtype == torch.float16 != part.dtype and bool((window.isinf() & part.isfinite().cpu()).any()):
        raise UserError(f"{name}: has values beyond float16's range; use bfloat16 or float32")
    return window


class _disk_errors:  # noqa: N801 (reads as a statement: with _disk_errors(file))
    """Turn what the file system refuses into one line that names the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{self.file}: the disk is full; free space or choose another destination") from error
        raise UserError(f"{self.file}: cannot be written ({error.strerror}); choose another destination") from error


def total_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of the tensors, headers not counted."""
    return sum(_bytes(shape, dtype) for shape in shapes.values())


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = _bytes(shape, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(
    names: list[str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> tuple[bytes, dict[str, int], int]:
    """The bytes before the data, each tensor's place in the file, and the file's size."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at, offsets = 0, {}
    for name in names:
        end = at + _bytes(shapes[name], dtype)
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [at, end]}
        offsets[name], at = at, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    start = 8 + len(text)
    return (
        len(text).to_bytes(8, "little") + text,
        {name: start + offset for name, offset in offsets.items()},
        start + at,
    )
