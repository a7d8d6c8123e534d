"""Megatron's distributed checkpoint (`torch_dist`), read tensor by tensor by one process; format: dist_format.py.

Numbers go straight to their place; the index is read by safe_load.py, so nothing a checkpoint brings along is run.
"""

import json
import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint import metadata as dcp

from fuserl_megatron.config.schema import UserError
from fuserl_megatron.convert.weight_files import read_into
from fuserl_megatron.mcore.dist_format import CONFIG, INDEX, numbers_of
from fuserl_megatron.mcore.safe_load import AGAIN, read_index


@dataclass(frozen=True)
class StoredKey:
    """One key: its dtype, its whole size, and its chunks as (offsets, sizes)."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


class DistReader:
    """The tensors of one iteration's folder. Several threads may read different parameters at once.

    Raises:
        UserError: one line: not a torch_dist checkpoint, or a damaged index, or a file that is missing or cut short.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        config, index = self.directory / CONFIG, read_index(directory)
        try:
            backend = json.loads(config.read_text())["sharded_backend"]
            self.keys = {
                key: StoredKey(
                    entry.properties.dtype,
                    tuple(entry.size),
                    tuple((tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks),
                )
                for key, entry in index.state_dict_metadata.items()
                if isinstance(entry, dcp.TensorStorageMetadata)
            }
            self._places = {
                (i.fqn, tuple(i.offset)): place for i, place in index.storage_data.items() if i.offset is not None
            }
        except FileNotFoundError:
            raise UserError(
                f"{self.directory}: no {CONFIG}, so not a complete distributed checkpoint; {AGAIN}"
            ) from None
        except Exception as error:  # damaged files lead to anything
            raise UserError(
                f"{self.directory}: {CONFIG} or {INDEX} is not readable ({type(error).__name__}: {error}); {AGAIN}"
            ) from None
        if backend != "torch_dist":
            raise UserError(
                f"{config}: sharded_backend = {backend!r} is not supported; save the checkpoint as torch_dist"
            )
        self._check_files()
        self._handles: dict[str, BinaryIO] = {}
        self._described: dict[tuple[str, tuple[int, ...]], tuple[Path, int, torch.dtype]] = {}
        self._found: dict[tuple[str, int | None], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        self._lock = threading.Lock()

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for place in self._places.values():
            if os.path.basename(place.relative_path) != place.relative_path:
                raise UserError(
                    f"{self.directory}: the index names {place.relative_path!r}, no file beside it; {AGAIN}"
                )
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            file = self.directory / name
            if not file.is_file():
                raise UserError(f"{file}: no such file, but the checkpoint's index names it; {AGAIN}")
            if file.stat().st_size < end:
                raise UserError(
                    f"{file}: {file.stat().st_size} bytes, but the index promises {end} (truncated?); {AGAIN}"
                )

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """One whole parameter in the stored dtype; see `read_rows`."""
        size = self.keys[key].size[0 if layer is None else 1 :]
        return self.read_rows(key, layer, 0, torch.empty(size, dtype=self.keys[key].dtype))

    def read_rows(self, key: str, layer: int | None, first: int, out: torch.Tensor) -> torch.Tensor:
        """Put a run of rows of one parameter together from its chunks, however they were cut.

        Args:
            key: as in `keys`.
            layer: index along the key's first dimension, which is then dropped; None for the whole key.
            first: first row of the parameter.
            out: [rows, ...], contiguous, in the stored dtype.

        Returns:
            `out`, filled.

        Raises:
            UserError: the chunks do not cover it, or a file is damaged.
        """
        filled = 0
        for offsets, sizes in self._chunks_of(key, layer):
            drop = 0 if layer is None else 1
            skipped = 0 if layer is None else layer - offsets[0]  # layers of the chunk before this one
            (start, *columns), (length, *widths) = offsets[drop:], sizes[drop:]
            begin, end = max(first, start), min(first + out.shape[0], start + length)
            if begin >= end:
                continue
            part = out[begin - first : end - first]
            for dim, (column, width) in enumerate(zip(columns, widths, strict=True), start=1):
                part = part.narrow(dim, column, width)
            self._read_chunk(key, offsets, sizes, (skipped * length + begin - start) * math.prod(widths), part)
            filled += part.numel()
        if filled != out.numel():
            raise UserError(f"{self.directory}: the chunks of {key} hold {filled} of {out.numel()} numbers; {AGAIN}")
        return out

    def _chunks_of(self, key: str, layer: int | None) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        if (key, layer) not in self._found:  # the same parameter is asked for many times in a row
            chunks = self.keys[key].chunks
            found = [c for c in chunks if layer is None or c[0][0] <= layer < c[0][0] + c[1][0]]
            if len({offsets for offsets, _ in found}) < len(found):  # another may be missing, and the sum still right
                raise UserError(f"{self.directory}: the index lists a chunk of {key} twice; {AGAIN}")
            self._found[key, layer] = found
        return self._found[key, layer]

    def _read_chunk(self, key: str, offsets: tuple, sizes: tuple, first: int, out: torch.Tensor) -> None:
        """Fill `out` with the chunk's numbers from number `first` on."""
        file, start, dtype = self._place_of(key, offsets, sizes)
        if dtype != out.dtype:
            raise UserError(f"{file}: {key} is {dtype}, but {out.dtype} is called for; {AGAIN}")
        target = out if out.is_contiguous() else torch.empty(out.shape, dtype=dtype)
        try:
            complete = read_into(self._handles[file.name], start + first * dtype.itemsize, target)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); {AGAIN}") from None
        if not complete:
            raise UserError(f"{file}: ends inside {key}; {AGAIN}")
        if target is not out:
            out.copy_(target)

    def _place_of(self, key: str, offsets: tuple, sizes: tuple) -> tuple[Path, int, torch.dtype]:
        """File, first byte and dtype of a chunk's numbers."""
        with self._lock:  # describing a chunk moves its file's position
            if (key, offsets) not in self._described:
                self._described[key, offsets] = self._describe(key, offsets, sizes)
            return self._described[key, offsets]

    def _describe(self, key: str, offsets: tuple, sizes: tuple) -> tuple[Path, int, torch.dtype]:
        place = self._places.get((key, offsets))
        if place is None:
            raise UserError(f"{self.directory}: the index does not say where {key} {list(offsets)} lies; {AGAIN}")
        file = self.directory / place.relative_path
        try:
            if file.name not in self._handles:
                self._handles[file.name] = open(file, "rb", buffering=0)
            dtype, start = numbers_of(self._handles[file.name], place.offset, place.length, math.prod(sizes))
        except Exception as error:  # zip and pickle raise anything on damaged bytes
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"{file}: {key} cannot be read ({type(error).__name__}: {reason}); {AGAIN}") from None
        return file, start, dtype

    def __enter__(self) -> "DistReader":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()
