"""Which weight files a Hugging Face directory has and what each holds; no tensor data is read here.

A safetensors file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte range) and the
raw bytes, without gaps. Everything a header or an index claims is checked against the files before anyone relies on it.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import is_plain_name, parse_json, read_json

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFE_INDEX, PICKLE_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
SAFE_SINGLE, PICKLE_SINGLE = "model.safetensors", "pytorch_model.bin"
MAX_HEADER_BYTES = 100 * 10**6  # what safetensors itself reads
_SHARD_NAME = re.compile(r"^model-\d+-of-\d+\.safetensors$")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. `start` is its first byte in the file; -1 for pickled files."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension (of the whole tensor when it has none)."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read and check one safetensors header against the size of its file.

    Raises:
        UserError: missing, truncated or malformed file, or a dtype no model weight has.
    """
    again = "fetch the file again"
    try:
        size = file.stat().st_size
        if not file.is_file():  # a pipe would never end
            raise UserError(f"{file}: not a regular file; {again}")
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{file}: truncated: {size} bytes hold no complete safetensors header; {again}")
            if length > MAX_HEADER_BYTES:
                raise UserError(f"{file}: a header of {length} bytes, more than the {MAX_HEADER_BYTES} of the format")
            header = parse_json(stream.read(length), file, "a safetensors file", again)
            header.pop("__metadata__", None)
            tensors, end = {}, 0
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                (first, last), shape = _sizes(entry["data_offsets"]), _sizes(entry["shape"])
                if entry["dtype"] not in SAFETENSORS_DTYPES:
                    raise UserError(f"{file}: {name} has dtype {entry['dtype']}; convert the model to bfloat16 first")
                stored = StoredTensor(file, SAFETENSORS_DTYPES[entry["dtype"]], shape, 8 + length + first)
                if first != end or last - first != stored.row_bytes * (shape[0] if shape else 1):
                    raise UserError(
                        f"{file}: the header gives {name} {last - first} bytes, not those of its shape; {again}"
                    )
                tensors[name], end = stored, last
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; fetch the missing shard") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not a safetensors file ({type(error).__name__}: {error}); {again}") from None
    if 8 + length + end != size:
        raise UserError(f"{file}: {size} bytes, but its header promises {8 + length + end} (truncated?); {again}")
    return tensors


def _sizes(values: list[Any]) -> tuple[int, ...]:
    """The values, which a header promises to be counts; ValueError where one is none."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{value!r} is no size")
    return tuple(values)


def find_files(directory: Path, allow_pickle: bool) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a model directory and, when there is an index, its tensor -> file map.

    Raises:
        UserError: no weights, pickled weights without leave, an ambiguous directory, or an index at odds with it.
    """
    single, index = directory / SAFE_SINGLE, directory / SAFE_INDEX
    if not single.exists() and not index.exists():
        single, index = directory / PICKLE_SINGLE, directory / PICKLE_INDEX
        if not single.exists() and not index.exists():
            raise UserError(f"{directory}: neither {SAFE_SINGLE} nor {SAFE_INDEX} is there; is it a complete model?")
        if not allow_pickle:
            raise UserError(
                f"{directory}: holds only pickled weights ({PICKLE_SINGLE}); convert them to safetensors, or, if "
                "you trust the file, use `fuserl convert` with --allow-pickle"
            )
    if single.exists() and index.exists():
        raise UserError(f"{directory}: holds both {single.name} and {index.name}; remove the one that is out of date")
    if single.exists():
        return [single], None
    try:
        weight_map = read_json(index, "a weight index", "fetch it again")["weight_map"]
        names = sorted(set(weight_map.values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a weight index ({type(error).__name__}: {error}); fetch it again") from None
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name):
            raise UserError(f"{index}: names the file {name!r}; only plain file names beside the index are read")
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: no such file, but {index.name} names it; fetch the missing shard")
    stray = sorted(f.name for f in directory.iterdir() if _SHARD_NAME.match(f.name) and f.name not in names)
    if stray:
        raise UserError(f"{directory / stray[0]}: a shard that {index.name} does not name; fetch the index again")
    return [directory / name for name in names], weight_map
