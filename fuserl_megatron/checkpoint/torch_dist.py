"""Megatron's distributed checkpoint (`torch_dist`), written tensor by tensor by one process.

    ROOT/latest_checkpointed_iteration.txt     the number of the newest iteration
    ROOT/iter_0000000/metadata.json            says that this is torch_dist
    ROOT/iter_0000000/common.pt                small plain values
    ROOT/iter_0000000/.metadata                which tensor lies where (torch.distributed.checkpoint)
    ROOT/iter_0000000/__0_0.distcp ...         the numbers: what `torch.save` makes of each chunk, one after another

A key names one parameter of all layers together (`decoder.layers.mlp.linear_fc2.weight`, [layers, H, F]); its chunks
are what single ranks hold, at their offsets. Chunks may be cut in any way: core puts them together at any layout.

Written here, read by reader.py. Neither imports megatron.core: no GPU, no process group, little memory.
"""

import functools
import io
import json
import math
import os
import pickle
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo  # part of the format: the index consists of them
from torch.distributed.checkpoint.utils import _create_file_view

from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import BadFile, read_bytes
from fuserl_megatron.util.tensor_io import write_at

POINTER = "latest_checkpointed_iteration.txt"
MAX_FILE_BYTES = 5 * 10**9
INDEX, CONFIG, COMMON = ".metadata", "metadata.json", "common.pt"
LAYERS = "decoder.layers."
AGAIN = "copy the checkpoint again, or name another iteration"
MAX_DIGITS = 18


def iteration_directory(root: str | Path, iteration: int) -> Path:
    """The folder of one iteration, as Megatron names it."""
    return Path(root) / f"iter_{iteration:07d}"


def saved_iterations(root: str | Path) -> list[int]:
    """Iterations with a complete checkpoint, oldest first."""
    found = (p.name.removeprefix("iter_") for p in Path(root).glob("iter_*") if p.is_dir())
    return sorted(int(n) for n in found if is_number(n))


def is_number(text: str) -> bool:
    """Whether a name or a pointer is the number of an iteration: "²" is a digit, too, and Python reads no integer of
    more than 4,300."""
    return text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS


def newest_iteration(root: str | Path) -> int | None:
    """The iteration the pointer names, None when there is no checkpoint.

    Raises:
        UserError: the pointer is not a number, or names a checkpoint that is not there.
    """
    pointer = Path(root) / POINTER
    if not pointer.exists():
        return None
    text = _pointer_text(pointer)
    have = saved_iterations(root)
    if not is_number(text) or int(text) not in have:
        raise UserError(
            f"{pointer} says {text[:40]!r}, but the checkpoints there are {have or 'none'}: "
            "write one of these numbers into the file, or remove it to start anew."
        )
    return int(text)


def _pointer_text(pointer: Path) -> str:
    advice = "remove it, or write the number of a checkpoint into it"
    return read_bytes(pointer, advice, limit=2**16).decode(errors="replace").strip()


def numbers_of(file: BinaryIO, start: int, length: int, numel: int) -> tuple[torch.dtype, int]:
    """Dtype of the tensor that `torch.save` put into a stretch of a file, and where its numbers lie: they are stored
    as they are in memory, and so can be read and written in pieces.

    Raises:
        ValueError: and what the loader raises, when it is not one contiguous tensor of `numel` numbers.
    """
    view: Any = _create_file_view(cast(io.IOBase, file), start, length)
    tensor = _without_numbers(view)
    storage = tensor.untyped_storage()
    if (tensor.numel(), storage.nbytes()) != (numel, numel * tensor.itemsize) or not tensor.is_contiguous():
        raise ValueError(f"not one contiguous tensor of {numel} numbers")
    offset: Any = storage._checkpoint_offset
    return tensor.dtype, start + offset


def _without_numbers(file: BinaryIO) -> torch.Tensor:
    """What torch's weights-only loader makes of a file, without touching the numbers."""
    if _meta_knows_places():
        return torch.load(file, map_location="meta", weights_only=True)
    from torch._subclasses.fake_tensor import FakeTensorMode  # its first use imports the compiler: 0.6 s, 100 MB

    with FakeTensorMode():
        return torch.load(file, map_location="cpu", weights_only=True)


@functools.cache
def _meta_knows_places() -> bool:
    """Whether this torch notes where the numbers of a tensor loaded to `meta` lie; older ones read all of them."""
    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    loaded = torch.load(file, map_location="meta", weights_only=True)
    return hasattr(loaded.untyped_storage(), "_checkpoint_offset")


def candidates(root: str | Path) -> tuple[list[int], str | None]:
    """Which checkpoints to try for a continuation, in this order, and what is wrong with the pointer.

    First the one that the pointer names, then older ones, the newest of them first, then newer ones: who wrote a
    smaller number into the pointer wants to go back.
    """
    have, pointer = saved_iterations(root), Path(root) / POINTER
    try:
        text = _pointer_text(pointer)
    except BadFile as error:
        if not pointer.exists():
            return have[::-1], f"{pointer} is missing" if have else None
        return have[::-1], f"{pointer}: {error.reason}"
    if not is_number(text):
        return have[::-1], f"{pointer} says {text[:40]!r}, which is no number"
    at = int(text)
    order = sorted(have, key=lambda i: (i > at, -i))
    return order, None if at in have else f"{pointer} says {at}, but {iteration_directory(root, at).name} is not there"


def _container(scratch: Path, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What `torch.save` puts before and after the numbers of a tensor; these are neither in memory nor written."""
    with tempfile.TemporaryFile(dir=scratch) as file:
        with torch.serialization.skip_data():
            torch.save(torch.empty(sizes, dtype=dtype), file)
        length, numel = file.seek(0, os.SEEK_END), math.prod(sizes)
        start = numbers_of(file, 0, length, numel)[1]
        end = start + numel * dtype.itemsize
        return os.pread(file.fileno(), start, 0), os.pread(file.fileno(), length - end, end)


class DistWriter:
    """Writes one iteration's folder. A chunk's place is reserved first; its numbers come in any order.

    Several ranks may write into one folder, each its own files; the one that calls `finish` is handed the others'
    `index`.
    """

    def __init__(self, directory: Path, rank: int = 0):
        self.directory, self._rank = directory, rank
        directory.mkdir(parents=True, exist_ok=True)
        self._entries: dict[str, Any] = {}
        self._places: dict[dcp.MetadataIndex, _StorageInfo] = {}
        self._around: dict[tuple[tuple[int, ...], torch.dtype], tuple[bytes, bytes]] = {}
        self.files: list[Path] = []
        self._file: BinaryIO | None = None

    def _stream(self) -> BinaryIO:
        if self._file is not None and self._file.tell() >= MAX_FILE_BYTES:
            self.close()
        if self._file is None:
            self.files.append(self.directory / f"__{self._rank}_{len(self.files)}.distcp")
            self._file = open(self.files[-1], "xb")
        return self._file

    def _append(self, value: Any, index: dcp.MetadataIndex) -> None:
        stream = self._stream()
        start = stream.tell()
        torch.save(value, stream)
        self._note(index, stream, start)

    def _note(self, index: dcp.MetadataIndex, stream: BinaryIO, start: int) -> None:
        stream.flush()
        self._places[index] = _StorageInfo(os.path.basename(stream.name), start, stream.tell() - start)

    def reserve(
        self, key: str, size: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype
    ) -> int:
        """Append one chunk of a key, zero so far (a hole in the file); returns the place of its numbers for `write`.

        Args:
            key: the parameter, without layer index.
            size: of the whole key.
            offsets: of the chunk in it.
            sizes: of the chunk, with as many dimensions as the key.
            dtype: of the key.
        """
        if key not in self._entries:
            properties = dcp.TensorProperties(dtype=dtype)
            self._entries[key] = dcp.TensorStorageMetadata(properties=properties, size=torch.Size(size), chunks=[])
        entry = self._entries[key]
        assert entry.properties.dtype == dtype and entry.size == torch.Size(size), f"{key}: chunks disagree"
        entry.chunks.append(dcp.ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)))
        if (sizes, dtype) not in self._around:  # all layers have the same shapes, and torch.save takes a millisecond
            self._around[sizes, dtype] = _container(self.directory, sizes, dtype)
        before, after = self._around[sizes, dtype]
        stream = self._stream()
        start = stream.tell()
        stream.write(before)
        stream.seek(math.prod(sizes) * dtype.itemsize, os.SEEK_CUR)
        stream.write(after)
        self._note(dcp.MetadataIndex(key, torch.Size(offsets)), stream, start)
        return start + len(before)

    def write(self, place: int, rows: torch.Tensor) -> None:
        """Write contiguous numbers into the chunk reserved last, at a byte counted from the start of the file."""
        assert self._file is not None, "reserve comes first"
        write_at(self._file.fileno(), place, rows)

    def object(self, key: str, values: list) -> None:
        """Append what is no tensor; [None] is what core saves for a module's extra state when there is none."""
        self._entries[key] = dcp.BytesStorageMetadata()
        self._append(values, dcp.MetadataIndex(key))

    @property
    def index(self) -> tuple[dict[str, Any], dict[dcp.MetadataIndex, _StorageInfo]]:
        """What was written here, and where."""
        return self._entries, self._places

    def finish(self, common: dict[str, Any], others: Iterable[tuple[dict, dict]] = ()) -> None:
        """Write the plain values and the index, in the form that core 0.16 wrote and 0.19 still reads.

        Args:
            common: the plain values.
            others: `index` of the other ranks.
        """
        self.close()
        for entries, places in others:
            for key, entry in entries.items():
                if key in self._entries and isinstance(entry, dcp.TensorStorageMetadata):
                    self._entries[key].chunks.extend(entry.chunks)
                else:
                    self._entries[key] = entry
            self._places |= places
        with open(self.directory / COMMON, "xb") as stream:  # by its path, a full disk would not be an OSError
            torch.save(common, stream)
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        config |= {"common_backend": "torch", "common_backend_version": 1}
        (self.directory / CONFIG).write_text(json.dumps(config))
        index = dcp.Metadata(self._entries, storage_data=self._places, storage_meta=dcp.StorageMeta())
        with open(self.directory / INDEX, "xb") as stream:
            pickle.dump(index, stream)

    def __enter__(self) -> "DistWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file being written."""
        if self._file is not None:
            self._file.close()
            self._file = None
