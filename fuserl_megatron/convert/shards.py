"""Reading Hugging Face weights: only the rows or columns that are asked for, at bounded memory.

A run of rows is one contiguous read; a run of columns passes through a small window of whole rows. Reads go through
`pread` and not through a memory map on purpose: mapped pages count as resident memory of every rank until the kernel
drops them, and a file truncated underneath a map kills the process instead of raising an error.
"""

from __future__ import annotations

import re
import threading
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from fuserl_megatron.convert.hf_config import ModelShape
from fuserl_megatron.convert.layout import hf_cuts, merge_qkv, padded_vocab_size
from fuserl_megatron.convert.names import find_rule, hf_names, hf_shapes
from fuserl_megatron.convert.shard_writer import ShardWriter as ShardWriter  # reading and writing under one name
from fuserl_megatron.convert.weight_files import StoredTensor, find_files, read_header
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.tensor_io import read_into

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WINDOW_BYTES = 16 * 2**20  # scratch for column reads and comparisons
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")  # old Llama files carry this buffer; it is computed from the config


class ShardReader:
    """All tensors of one Hugging Face model directory, by name. Several threads may read it unless it is `pickled`.

    Args:
        directory: holds `model.safetensors`, or shards with `model.safetensors.index.json`.
        allow_pickle: also accept `pytorch_model.bin` files, loaded with torch's weights-only unpickler.

    Raises:
        UserError: one line naming the file: missing, truncated, not safetensors, or at odds with the index.
    """

    def __init__(self, directory: str | Path, allow_pickle: bool = False) -> None:
        self.directory = Path(directory)
        self._pickled: tuple[Path, dict[str, torch.Tensor]] | None = None
        self._handles: dict[Path, BinaryIO] = {}
        self._lock = threading.Lock()
        files, weight_map = find_files(self.directory, allow_pickle)
        self.tensors: dict[str, StoredTensor] = {}
        for file in files:
            for name, tensor in self._headers(file).items():
                if weight_map is not None and weight_map.get(name) != file.name:
                    said = f"puts it in {weight_map[name]}" if name in weight_map else "does not list it"
                    raise UserError(f"{file}: holds {name} but the index {said}; fetch both again")
                self.tensors[name] = tensor
        for name, promised in (weight_map or {}).items():
            if name not in self.tensors:
                raise UserError(f"{self.directory / promised}: lacks {name}, which the index promises; fetch it again")

    def _headers(self, file: Path) -> dict[str, StoredTensor]:
        if file.suffix == ".safetensors":
            return read_header(file)
        loaded = self._load_pickle(file)
        return {name: StoredTensor(file, t.dtype, tuple(t.shape), -1) for name, t in loaded.items()}

    def _load_pickle(self, file: Path) -> dict[str, torch.Tensor]:
        if self._pickled is None or self._pickled[0] != file:
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            except MemoryError:  # no fault of the files
                raise
            except Exception as error:  # the unpickler raises many kinds; the user needs the file's name
                reason = str(error).strip().split("\n")[0]
                raise UserError(
                    f"{file}: not loadable as plain weights ({reason}); convert it to safetensors"
                ) from None
            if not isinstance(loaded, dict) or not all(_is_plain(*item) for item in loaded.items()):
                raise UserError(
                    f"{file}: holds more than named, dense tensors; save the model's state dict as safetensors"
                )
            self._pickled = (file, loaded)
        return self._pickled[1]

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every open file. The reader may be used again afterwards."""
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()
        self._pickled = None

    @property
    def pickled(self) -> bool:
        """Whether the weights come from pickles, of which one file at a time is held open."""
        return self._pickled is not None

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor lies, its dtype and shape; a missing tensor is a UserError naming directory and tensor."""
        if name not in self.tensors:
            raise UserError(
                f"{self.directory}: no weight file holds {name}; fetch the model again or correct config.json"
            )
        return self.tensors[name]

    def read(
        self, name: str, dim: int = 0, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read a tensor, or a run of its rows (dim 0) or columns (dim 1).

        Args:
            name: Hugging Face tensor name.
            dim: dimension that is cut.
            start: first index along it.
            stop: one past the last index; None for all.
            out: contiguous tensor of the right shape and the stored dtype to read into; None for a new one.

        Returns:
            `out`, contiguous and in the stored dtype; besides it only a small window is held in memory.

        Raises:
            UserError: no such tensor, no such range (the config promised more than the file has), or a file cut short.
        """
        stored = self.stored(name)
        shape = stored.shape or (1,)
        stop = shape[dim] if stop is None else stop
        if dim >= len(shape) or not 0 <= start <= stop <= shape[dim]:
            raise UserError(
                f"{stored.file}: {name} has shape {list(stored.shape)}, but config.json asks for {start} to {stop} of "
                f"dimension {dim}; one of them belongs to another model"
            )
        needed = (*shape[:dim], stop - start, *shape[dim + 1 :])
        if out is None:
            out = torch.empty(needed, dtype=stored.dtype)
        elif (out.shape, out.dtype) != (needed, stored.dtype):
            raise UserError(
                f"{stored.file}: {name} is {stored.dtype} {list(stored.shape)}, which does not fit the {out.dtype} "
                f"{list(out.shape)} it is read into; config.json and weights disagree, or the file mixes dtypes"
            )
        if stored.start < 0:
            out.copy_(self._load_pickle(stored.file)[name].reshape(shape).narrow(dim, start, stop - start))
        elif dim == 0:
            self._read_rows(name, stored, start, out)
        else:
            step = max(1, WINDOW_BYTES // max(1, stored.row_bytes))
            window = torch.empty(min(step, shape[0]), *shape[1:], dtype=stored.dtype)
            for first in range(0, shape[0], step):
                rows = window[: min(step, shape[0] - first)]
                self._read_rows(name, stored, first, rows)
                out[first : first + len(rows)] = rows.narrow(dim, start, stop - start)
        return out if stored.shape else out.reshape(())

    def _read_rows(self, name: str, stored: StoredTensor, start: int, out: torch.Tensor) -> None:
        """Fill `out`, which is contiguous, from row `start` on."""
        if out.numel() == 0:
            return
        try:
            with self._lock:
                if stored.file not in self._handles:
                    self._handles[stored.file] = open(stored.file, "rb", buffering=0)
            complete = read_into(self._handles[stored.file], stored.start + start * stored.row_bytes, out)
        except OSError as error:  # without the file's name it would pass for the destination's
            raise UserError(f"{stored.file}: cannot be read ({error.strerror}); copy it again") from None
        if not complete:
            raise UserError(f"{stored.file}: ends inside {name}; the file was cut short while it was read")


def _is_plain(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided


def check_tensors(reader: ShardReader, shape: ModelShape) -> None:
    """Compare names, shapes and dtypes of the files with what the config promises, in both directions.

    Two harmless extras are let through: rotary inverse-frequency buffers of old files, and `lm_head.weight` beside tied
    embeddings when it equals them.

    Raises:
        UserError: one line naming the first tensor that is missing, unknown, of another shape, or not a float weight.
    """
    check_num_layers(shape, len(reader.tensors), reader.directory)
    expected = hf_shapes(shape)
    for name, dimensions in expected.items():
        stored = reader.stored(name)
        if stored.shape != dimensions:
            raise UserError(
                f"{stored.file}: {name} has shape {list(stored.shape)}, but config.json says {list(dimensions)}; "
                "one of them belongs to another model"
            )
        if stored.dtype not in WEIGHT_DTYPES:
            raise UserError(f"{stored.file}: {name} has dtype {stored.dtype}; convert the model to bfloat16 first")
    for name in reader.tensors:
        if name in expected or _DERIVED.search(name):
            continue
        stored = reader.stored(name)
        if name == "lm_head.weight":
            if _same_rows(reader, name, "model.embed_tokens.weight"):
                continue
            raise UserError(
                f"{stored.file}: lm_head.weight differs from the embedding, but config.json ties them; "
                "set tie_word_embeddings to false"
            )
        raise UserError(
            f"{stored.file}: holds {name}, which a {shape.family} model with this config.json does not have"
        )


def check_num_layers(shape: ModelShape, count: int, where: str | Path) -> None:
    """Refuse a number of layers that so many tensors cannot make up, before all names of all layers are listed."""
    if shape.num_layers > count:
        raise UserError(
            f"{where}: config.json says num_hidden_layers = {shape.num_layers}, but there are {count} tensors in all; "
            "one of them belongs to another model"
        )


def _same_rows(reader: ShardReader, first: str, second: str) -> bool:
    a, b = reader.stored(first), reader.stored(second)
    if a.shape != b.shape:
        return False
    step = max(1, WINDOW_BYTES // max(1, a.row_bytes))
    runs = ((at, min(a.shape[0], at + step)) for at in range(0, a.shape[0], step))
    return all(torch.equal(reader.read(first, 0, *run), reader.read(second, 0, *run)) for run in runs)


def read_parameter(
    reader: ShardReader,
    shape: ModelShape,
    megatron_name: str,
    tp_size: int = 1,
    tp_rank: int = 0,
    *,
    padded_vocab: int | None = None,
) -> torch.Tensor:
    """Read what one tensor-parallel rank holds of one Megatron parameter, touching only that part of the files.

    Args:
        reader: the model's files.
        shape: its config.
        megatron_name: a name of the local or the Transformer Engine spec with the global layer index. For tied models
            `output_layer.weight` reads the embedding (the last pipeline stage's copy).
        tp_size: number of tensor-parallel ranks.
        tp_rank: which of them.
        padded_vocab: vocabulary rows of the Megatron model, a multiple of tp_size; None for the smallest multiple.

    Returns:
        A new contiguous tensor in the stored dtype; vocabulary rows past the real vocabulary are zero.

    Raises:
        UserError: the model lacks the parameter, the files disagree with the config, or tp_size does not divide.
    """
    row, _ = find_rule(megatron_name)
    if row.rule == "vocab":
        (name,) = hf_names(megatron_name, shape)
        padded = padded_vocab or padded_vocab_size(shape.vocab_size, tp_size)
        if padded % tp_size or padded < shape.vocab_size:
            raise UserError(
                f"padded vocabulary {padded} must be a multiple of tensor_model_parallel_size = {tp_size} and at least "
                f"vocab_size = {shape.vocab_size}; use {padded_vocab_size(shape.vocab_size, tp_size)}"
            )
        rows = padded // tp_size
        start, stop = (min(shape.vocab_size, bound) for bound in (tp_rank * rows, (tp_rank + 1) * rows))
        out = torch.zeros(rows, shape.hidden_size, dtype=reader.stored(name).dtype)
        reader.read(name, 0, start, stop, out=out[: stop - start])
        return out
    cuts = hf_cuts(megatron_name, shape, tp_size, tp_rank)
    if row.rule == "gate_up":  # straight into the two halves: this is a layer's largest tensor
        (gate, _, start, stop), _ = cuts
        stored, rows = reader.stored(gate), stop - start
        out = torch.empty(2 * rows, *stored.shape[1:], dtype=stored.dtype)
        for (name, dim, first, last), half in zip(cuts, out.split(rows), strict=True):
            reader.read(name, dim, first, last, out=half)
        return out
    parts = [reader.read(*cut) for cut in cuts]
    if row.rule != "qkv":
        return parts[0]
    q, k, v = parts
    return merge_qkv(q, k, v, shape)
