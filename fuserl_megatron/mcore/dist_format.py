"""Megatron's distributed checkpoint (`torch_dist`), written tensor by tensor by one process.

    ROOT/latest_checkpointed_iteration.txt     the number of the newest iteration
    ROOT/iter_0000000/metadata.json            says that this is torch_dist
    ROOT/iter_0000000/common.pt                small plain values
    ROOT/iter_0000000/.metadata                which tensor lies where (torch.distributed.checkpoint)
    ROOT/iter_0000000/__0_0.distcp ...         the numbers: what `torch.save` makes of each chunk, one after another

A key names one parameter of all layers together (`decoder.layers.mlp.linear_fc2.weight`, [layers, H, F]); its chunks
are what single ranks hold, at their offsets. Chunks may be cut in any way: core puts them together at any layout.

Written here, read by dist_reader.py. Neither imports megatron.core: no GPU, no process group, little memory.
"""

import json
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo  # part of the format: the index consists of them

from fuserl_megatron.config.schema import UserError
from fuserl_megatron.convert.shard_writer import write_behind

POINTER = "latest_checkpointed_iteration.txt"
MAX_FILE_BYTES = 5 * 10**9
INDEX, CONFIG, COMMON = ".metadata", "metadata.json", "common.pt"
LAYERS = "decoder.layers."


def iteration_directory(root: str | Path, iteration: int) -> Path:
    """The folder of one iteration, as Megatron names it."""
    return Path(root) / f"iter_{iteration:07d}"


def saved_iterations(root: str | Path) -> list[int]:
    """Iterations with a complete checkpoint, oldest first."""
    found = (p.name.removeprefix("iter_") for p in Path(root).glob("iter_*") if p.is_dir())
    return sorted(int(n) for n in found if n.isdigit())


def newest_iteration(root: str | Path) -> int | None:
    """The iteration the pointer names, None when there is no checkpoint.

    Raises:
        UserError: the pointer is not a number, or names a checkpoint that is not there.
    """
    pointer = Path(root) / POINTER
    if not pointer.exists():
        return None
    text = pointer.read_text(errors="replace").strip()
    have = saved_iterations(root)
    if not text.isdigit() or int(text) not in have:
        raise UserError(
            f"{pointer} says {text[:40]!r}, but the checkpoints there are {have or 'none'}: "
            "write one of these numbers into the file, or remove it to start anew."
        )
    return int(text)


class DistWriter:
    """Writes one iteration's folder. Every tensor is written and may be dropped before the next is made."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True)
        self._entries: dict[str, Any] = {}
        self._places: dict[dcp.MetadataIndex, _StorageInfo] = {}
        self._files = 0
        self._file: BinaryIO | None = None

    def _stream(self) -> BinaryIO:
        if self._file is not None and self._file.tell() >= MAX_FILE_BYTES:
            self.close()
        if self._file is None:
            self._file = open(self.directory / f"__0_{self._files}.distcp", "xb")
            self._files += 1
        return self._file

    def _append(self, value: Any, index: dcp.MetadataIndex) -> None:
        stream = self._stream()
        start = stream.tell()
        # torch.load never looks at the check sums, and they cost ten times what the writing does
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(value, stream)
        finally:
            torch.serialization.set_crc32_options(before)
        stream.flush()
        self._places[index] = _StorageInfo(os.path.basename(stream.name), start, stream.tell() - start)
        write_behind(stream.fileno(), start, stream.tell() - start)

    def tensor(self, key: str, size: tuple[int, ...], offsets: tuple[int, ...], chunk: torch.Tensor) -> None:
        """Append one chunk of a key.

        Args:
            key: the parameter, without layer index.
            size: of the whole key.
            offsets: of the chunk in it.
            chunk: contiguous, with as many dimensions as the key.
        """
        if key not in self._entries:
            properties = dcp.TensorProperties(dtype=chunk.dtype)
            self._entries[key] = dcp.TensorStorageMetadata(properties=properties, size=torch.Size(size), chunks=[])
        entry = self._entries[key]
        assert entry.properties.dtype == chunk.dtype and entry.size == torch.Size(size), f"{key}: chunks disagree"
        entry.chunks.append(dcp.ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=chunk.shape))
        self._append(chunk, dcp.MetadataIndex(key, torch.Size(offsets)))

    def empty_object(self, key: str) -> None:
        """Append what core saves for a module's extra state when there is none."""
        self._entries[key] = dcp.BytesStorageMetadata()
        self._append([None], dcp.MetadataIndex(key))

    def finish(self, common: dict[str, Any]) -> None:
        """Write the plain values and the index, in the form that core 0.16 wrote and 0.19 still reads."""
        self.close()
        torch.save(common, self.directory / COMMON)
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        config |= {"common_backend": "torch", "common_backend_version": 1}
        (self.directory / CONFIG).write_text(json.dumps(config))
        index = dcp.Metadata(
            self._entries, storage_data=self._places, storage_meta=dcp.StorageMeta(self.directory.name)
        )
        with open(self.directory / INDEX, "xb") as stream:
            pickle.dump(index, stream)

    def __enter__(self) -> "DistWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file being written."""
        if self._file is not None:
            self._file.close()
            self._file = None
