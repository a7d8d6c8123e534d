"""Megatron's distributed checkpoint (`torch_dist`), read tensor by tensor by one process; format: torch_dist.py.

Numbers go straight to their place; the index is read by safe_load.py, so nothing a checkpoint brings along is run.
"""

import math
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import metadata as dcp

from fuserl_megatron.checkpoint.safe_load import read_index, read_state
from fuserl_megatron.checkpoint.torch_dist import AGAIN, CONFIG, INDEX, numbers_of
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import is_plain_name, read_json
from fuserl_megatron.util.tensor_io import read_into


@dataclass(frozen=True)
class StoredKey:
    """One key: its dtype, its whole size, and its chunks as (offsets, sizes)."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def _stored_key(entry: dcp.TensorStorageMetadata) -> StoredKey:
    """Raises ValueError where the index contradicts itself."""
    chunks = tuple((tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks)
    for offsets, sizes in chunks:
        if any(not 0 <= o <= o + n <= whole for o, n, whole in zip(offsets, sizes, entry.size, strict=True)):
            raise ValueError(f"a chunk at {list(offsets)} of size {list(sizes)} in a tensor of {list(entry.size)}")
    return StoredKey(entry.properties.dtype, tuple(entry.size), chunks)


class DistReader:
    """The tensors of one iteration's folder. Several threads may read different parameters at once.

    Raises:
        UserError: one line: not a torch_dist checkpoint, or a damaged index, or a file that is missing or cut short.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        index, config = read_index(directory), self.directory / CONFIG
        if not config.exists():
            raise UserError(f"{self.directory}: no {CONFIG}, so not a complete distributed checkpoint; {AGAIN}")
        backend = read_json(config, "readable as JSON", AGAIN).get("sharded_backend")
        if backend != "torch_dist":
            raise UserError(
                f"{config}: sharded_backend = {backend!r} is not supported; save the checkpoint as torch_dist"
            )
        try:
            self.keys = {
                key: _stored_key(entry)
                for key, entry in index.state_dict_metadata.items()
                if isinstance(entry, dcp.TensorStorageMetadata)
            }
            self._places = {
                (i.fqn, None if i.offset is None else tuple(i.offset)): place for i, place in index.storage_data.items()
            }
            self._check_files()
        except UserError:
            raise
        except Exception as error:  # damaged files lead to anything
            raise UserError(
                f"{self.directory}: {INDEX} is not readable ({type(error).__name__}: {error}); {AGAIN}"
            ) from None
        self._handles: dict[str, BinaryIO] = {}
        self._described: dict[tuple[str, tuple[int, ...]], tuple[Path, int, torch.dtype]] = {}
        self._found: dict[tuple[str, int | None], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        self._lock = threading.Lock()

    def _check_files(self) -> None:
        """Every place of the index is a stretch of a file in this very folder, as it lies there."""
        ends: dict[str, int] = {}
        for place in self._places.values():
            name, start, length = place.relative_path, place.offset, place.length
            if not is_plain_name(name):
                raise UserError(f"{self.directory}: the index names {name!r}, no file beside it; {AGAIN}")
            if getattr(place, "transform_descriptors", None):
                raise UserError(f"{self.directory}: {name} is compressed or encoded, which is not supported")
            if not 0 <= start <= start + length:
                raise ValueError(f"{length} bytes from byte {start} on")
            ends[name] = max(ends.get(name, 0), start + length)
        held = Counter[str]()
        for (key, _), place in self._places.items():
            held[key] += place.length
        for key, stored in self.keys.items():  # before anybody makes room for it
            if math.prod(stored.size) * stored.dtype.itemsize > held[key]:
                raise UserError(f"{self.directory}: {key} is {tuple(stored.size)}, more than is there; {AGAIN}")
        for name, end in ends.items():
            file = self.directory / name
            if not file.is_file():
                raise UserError(f"{file}: no such file, but the checkpoint's index names it; {AGAIN}")
            if file.resolve().parent != self.directory.resolve():
                raise UserError(f"{file}: a link that leads out of the checkpoint; copy the file itself there")
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

    def read_region(self, key: str, start: tuple[int, ...], out: torch.Tensor) -> None:
        """Fill `out`, of any dtype and device, with the part of a key that begins at `start`, however it was cut.

        Args:
            key: as in `keys`.
            start: first index along every dimension of the key.
            out: as many dimensions as the key.

        Raises:
            UserError: the chunks do not cover it, or a file is damaged.
        """
        filled, dtype = 0, self.keys[key].dtype
        for offsets, sizes in self._chunks_of(key, None, dims=0):
            box = [(max(s, o), min(s + n, o + m)) for s, n, o, m in zip(start, out.shape, offsets, sizes, strict=True)]
            if any(first >= end for first, end in box):
                continue
            piece = out[tuple(slice(first - s, end - s) for (first, end), s in zip(box, start, strict=True))]
            # along the first dimension that is longer than one only what is needed is read
            cut = next((dim for dim, size in enumerate(sizes) if size > 1), 0)
            within = [slice(first - o, end - o) for (first, end), o in zip(box, offsets, strict=True)]
            rows, rest = (within[cut], sizes[cut + 1 :]) if sizes else (slice(0, 1), ())
            shape = (*sizes[:cut], rows.stop - rows.start, *rest) if sizes else ()
            whole = piece.shape == shape and piece.is_contiguous() and piece.dtype == dtype
            window = piece if whole and piece.device.type == "cpu" else torch.empty(shape, dtype=dtype)
            self._read_chunk(key, offsets, sizes, rows.start * math.prod(rest), window)
            if window is not piece:
                piece.copy_(window[(*within[:cut], slice(None), *within[cut + 1 :])] if sizes else window)
            filled += piece.numel()
        if filled != out.numel():
            raise UserError(f"{self.directory}: the chunks of {key} hold {filled} of {out.numel()} numbers; {AGAIN}")

    def read_object(self, key: str) -> Any:
        """What is no tensor, a module's extra state above all; read by safe_load.py.

        Raises:
            UserError: it is not there, is damaged, or names anything foreign.
        """
        place = self._places.get((key, None))
        if place is None:
            raise UserError(f"{self.directory}: holds no {key}, which this model has")
        file = self.directory / place.relative_path
        try:
            with open(file, "rb") as stream:
                stream.seek(place.offset)
                content = stream.read(place.length)
        except OSError as error:
            raise UserError(f"{file}: {key} cannot be read ({error.strerror}); {AGAIN}") from None
        return read_state(content, file)

    def _chunks_of(self, key: str, layer: int | None, dims: int = 1) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        if (key, layer) not in self._found:  # the same parameter is asked for many times in a row
            chunks = self.keys[key].chunks
            if any(len(sizes) < dims + (layer is not None) for _, sizes in chunks):
                raise UserError(f"{self.directory}: {key} has too few dimensions for a parameter; {AGAIN}")
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
