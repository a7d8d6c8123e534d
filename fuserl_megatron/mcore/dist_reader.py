"""Megatron's distributed checkpoint (`torch_dist`), read tensor by tensor by one process; format: dist_format.py.

Nothing here unpickles foreign classes: of the two pickled parts (the index, and the few bytes that describe a chunk)
only known plain types are built, everything else becomes an inert object. Numbers go straight to their place.
"""

import io
import json
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from fuserl_megatron.config.schema import UserError
from fuserl_megatron.convert.shard_writer import Scratch
from fuserl_megatron.mcore.dist_format import CONFIG, INDEX

_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
}
_AGAIN = "copy the checkpoint again, or name another iteration"


@dataclass(frozen=True)
class StoredKey:
    """One key: its dtype, its whole size, and its chunks as (offsets, sizes)."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


class DistReader:
    """The tensors of one iteration's folder.

    Raises:
        UserError: one line: not a torch_dist checkpoint, or a damaged index, or a file that is missing or cut short.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        config, index = self.directory / CONFIG, self.directory / INDEX
        try:
            backend = json.loads(config.read_text())["sharded_backend"]
            with open(index, "rb") as stream:
                content = _PlainUnpickler(stream).load()
            self.keys = {
                key: StoredKey(
                    entry.properties.dtype,
                    tuple(entry.size),
                    tuple((tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks),
                )
                for key, entry in content.state_dict_metadata.items()
                if isinstance(entry, dcp.TensorStorageMetadata)
            }
            self._places = {
                (i.fqn, tuple(i.offset)): place for i, place in content.storage_data.items() if i.offset is not None
            }
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise UserError(
                f"{self.directory}: no {missing}, so not a complete distributed checkpoint; {_AGAIN}"
            ) from None
        except Exception as error:  # a damaged pickle raises anything
            raise UserError(
                f"{index}: not a readable checkpoint index ({type(error).__name__}: {error}); {_AGAIN}"
            ) from None
        if backend != "torch_dist":
            raise UserError(
                f"{config}: sharded_backend = {backend!r} is not supported; save the checkpoint as torch_dist"
            )
        self._check_files()
        self._handles: dict[str, BinaryIO] = {}

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for place in self._places.values():
            if os.path.basename(place.relative_path) != place.relative_path:
                raise UserError(
                    f"{self.directory}: the index names {place.relative_path!r}, no file beside it; {_AGAIN}"
                )
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            file = self.directory / name
            if not file.is_file():
                raise UserError(f"{file}: no such file, but the checkpoint's index names it; {_AGAIN}")
            if file.stat().st_size < end:
                raise UserError(
                    f"{file}: {file.stat().st_size} bytes, but the index promises {end} (truncated?); {_AGAIN}"
                )

    def read(self, key: str, layer: int | None = None, scratch: Scratch | None = None) -> torch.Tensor:
        """Put one parameter together from its chunks, at the memory of the parameter.

        Args:
            key: as in `keys`.
            layer: index along the first dimension, which is then dropped; None for the whole key.
            scratch: where to put it; None for memory of its own.

        Returns:
            A contiguous tensor in the stored dtype.

        Raises:
            UserError: the chunks do not cover it, or a file is damaged.
        """
        stored = self.keys[key]
        drop = 0 if layer is None else 1
        out = (torch if scratch is None else scratch).empty(stored.size[drop:], dtype=stored.dtype)
        filled = 0
        for offsets, sizes in stored.chunks:
            if layer is not None and not offsets[0] <= layer < offsets[0] + sizes[0]:
                continue
            part = out
            for dim, (start, length) in enumerate(zip(offsets[drop:], sizes[drop:], strict=True)):
                part = part.narrow(dim, start, length)
            skip = 0 if layer is None else layer - offsets[0]
            self._read_chunk(key, offsets, sizes, skip * math.prod(sizes[1:]), part)
            filled += part.numel()
        if filled != out.numel():
            raise UserError(f"{self.directory}: the chunks of {key} hold {filled} of {out.numel()} numbers; {_AGAIN}")
        return out

    def _read_chunk(self, key: str, offsets: tuple, sizes: tuple, first: int, out: torch.Tensor) -> None:
        """Fill `out` with the chunk's numbers from number `first` on."""
        place = self._places.get((key, offsets))
        if place is None:
            raise UserError(f"{self.directory}: the index does not say where {key} {list(offsets)} lies; {_AGAIN}")
        file = self.directory / place.relative_path
        if place.relative_path not in self._handles:
            self._handles[place.relative_path] = open(file, "rb", buffering=0)
        handle = self._handles[place.relative_path]
        try:
            dtype, start = _describe(_Window(handle, place.offset, place.length), math.prod(sizes))
        except Exception as error:  # zip and pickle raise anything on damaged bytes
            raise UserError(f"{file}: {key} cannot be read ({type(error).__name__}: {error}); {_AGAIN}") from None
        if dtype != out.dtype:
            raise UserError(f"{file}: {key} is {dtype}, but the index says {out.dtype}; {_AGAIN}")
        target = out if out.is_contiguous() else torch.empty(out.shape, dtype=dtype)
        view = memoryview(target.view(-1).view(torch.uint8).numpy())
        at, done = place.offset + start + first * dtype.itemsize, 0
        while done < len(view):
            count = os.preadv(handle.fileno(), [view[done : done + 2**30]], at + done)
            if count == 0:
                raise UserError(f"{file}: ends inside {key}; {_AGAIN}")
            done += count
        if target is not out:
            out.copy_(target)

    def __enter__(self) -> "DistReader":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()


class _Window:
    """A stretch of an open file as a file of its own, for zipfile."""

    def __init__(self, handle: BinaryIO, start: int, length: int):
        self._handle, self._start, self._length, self._at = handle, start, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        content = os.pread(self._handle.fileno(), left if count < 0 else min(count, left), self._start + self._at)
        self._at += len(content)
        return content


def _describe(window: _Window, numel: int) -> tuple[torch.dtype, int]:
    """What `torch.save` wrote there: the dtype of the one contiguous tensor, and where its numbers start."""
    with zipfile.ZipFile(window) as archive:
        records = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
    start, length = _record(window, records["data.pkl"])
    window.seek(start)
    (dtype, name), offset, size, stride = _TensorUnpickler(io.BytesIO(window.read(length))).load()
    if offset or math.prod(size) != numel or tuple(stride) != torch.empty(size, device="meta").stride():
        raise ValueError(f"not one contiguous tensor of {numel} numbers")
    start, length = _record(window, records[f"data/{name}"])
    if length != numel * dtype.itemsize:
        raise ValueError(f"{length} bytes for {numel} numbers of {dtype}")
    return dtype, start


def _record(window: _Window, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a record's bytes are. Read without zipfile, which would want the check sums that torch may leave out."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed")
    window.seek(info.header_offset + 26)  # the lengths of name and extra field in the record's own header
    lengths = window.read(4)
    name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    return info.header_offset + 30 + name + extra, info.file_size


class _Inert:
    """Stands for every class that is not needed: takes anything, does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any):
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any):
        pass


class _PlainUnpickler(pickle.Unpickler):
    """The index: torch's metadata classes, sizes, dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if module == dcp.__name__ and not name.startswith("__") and isinstance(getattr(dcp, name, None), type):
            return getattr(dcp, name)
        if (module, name) == (filesystem.__name__, "_StorageInfo"):
            return filesystem._StorageInfo
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Inert


class _TensorUnpickler(pickle.Unpickler):
    """One saved tensor, as ((dtype, record), offset, size, stride)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a plain tensor")

    def persistent_load(self, description: Any) -> tuple[torch.dtype, str]:
        _, dtype, record, *_ = description
        return dtype, record
