"""Where the numbers of a tensor lie inside what `torch.save` made of it: a zip whose records are stored uncompressed.

So they are read and written in place, in pieces, without the loader. Nothing is unpickled but a tensor's description.
"""

import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO

import torch

_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
}


class Window:
    """A stretch of an open file as a file of its own, for zipfile."""

    def __init__(self, handle: BinaryIO, start: int, length: int):
        self._handle, self._start, self._length, self._at = handle, start, length, 0

    def seekable(self) -> bool:
        """As a file's."""
        return True

    def tell(self) -> int:
        """As a file's."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As a file's."""
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def read(self, count: int = -1) -> bytes:
        """As a file's."""
        left = max(0, self._length - self._at)
        content = os.pread(self._handle.fileno(), left if count < 0 else min(count, left), self._start + self._at)
        self._at += len(content)
        return content


def describe_tensor(window: Window, numel: int) -> tuple[torch.dtype, int]:
    """What `torch.save` wrote there: the dtype of the one contiguous tensor, and where its numbers start.

    Raises:
        ValueError: and what zip and pickle raise, when it is no such thing.
    """
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


def _record(window: Window, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a record's bytes are. Read without zipfile, which would want the check sums that torch may leave out."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed")
    window.seek(info.header_offset + 26)  # the lengths of name and extra field in the record's own header
    lengths = window.read(4)
    name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    return info.header_offset + 30 + name + extra, info.file_size


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
