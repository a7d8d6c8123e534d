"""Pickles from outside, read without running what they bring along.

A distributed checkpoint holds three kinds: the index (`.metadata`), the plain values (`common.pt`) and, inside the
files of numbers, a few bytes of extra state per module. Core's loader reads the first and the last with plain pickle,
which calls whatever they name. So core's loader is never called: each is read here, once, by an unpickler that knows a
short list of harmless names, and what came out of it is what is used (loading.py). Any other name is refused and
nothing is called. Numbers are only ever read by torch's weights-only loader.
"""

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as dcp

from fuserl_megatron.checkpoint.torch_dist import AGAIN, COMMON, INDEX
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import read_bytes

MAX_PICKLE_BYTES = 2**31
"""Of an index or the plain values: a trillion parameters on 10,000 ranks make an index of some 100 MB."""


class _Inert:
    """Stands for every class that is known but not needed: takes anything, does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any):
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any):
        pass

    def __setstate__(self, _state: Any):
        pass


def _classes(module: Any) -> dict[tuple[str, str], type]:
    own = (x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__)
    return {(module.__name__, x.__qualname__): x for x in own}


_INDEX_NAMES = (
    _classes(dcp)
    | dict.fromkeys(_classes(planner), _Inert)
    | {("megatron.core.dist_checkpointing.strategies.torch", n): _Inert for n in ("MCoreMetadata", "MCoreSavePlan")}
    | {("torch", str(x).removeprefix("torch.")): x for x in vars(torch).values() if isinstance(x, torch.dtype)}
    | {("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): torch.serialization._get_layout}
    | {(filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo, ("collections", "OrderedDict"): OrderedDict}
    | {("pathlib", "PosixPath"): _Inert, ("pathlib._local", "PosixPath"): _Inert}
)
"""What an index may name: torch's checkpoint metadata; what only describes the saving stays inert."""


class _ForeignName(pickle.UnpicklingError):
    """A name that no checkpoint needs."""


def _load_from_bytes(content: bytes) -> Any:
    return _weights_only(io.BytesIO(content))


_FP8_NAMES = {
    ("transformer_engine.common.recipe", name): _Inert
    for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    + ("NVFP4BlockScaling", "Format", "_FormatHelper", "MMParams", "QParams")
} | {
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"): _Inert,
    ("torch._utils", "_rebuild_tensor_v2"): _Inert,
    # core 0.19 puts its own function in the place of torch's, so that states saved under it name that one
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
    ("megatron.core.safe_globals", "safe_load_from_bytes"): _load_from_bytes,
    ("numpy._core.multiarray", "_reconstruct"): _Inert,
    ("numpy.core.multiarray", "_reconstruct"): _Inert,
    ("numpy", "ndarray"): _Inert,
    ("numpy", "dtype"): _Inert,
    ("collections", "OrderedDict"): OrderedDict,
}
"""What Transformer Engine's extra state may name: recipes, tensors, arrays (the list that core 0.19 checks by)."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, names: dict[tuple[str, str], Any]):
        super().__init__(stream)
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise _ForeignName(f"{module}.{name}")
        return self._names[module, name]


@contextmanager
def _reading(file: Path, problem: str) -> Iterator[None]:
    """Around the reading of a pickle: whatever is wrong with it becomes one line for the user."""
    try:
        yield
    except _ForeignName as error:
        raise UserError(
            f"{file}: names {error}, which no checkpoint needs and which could run commands: not opened; "
            "use a checkpoint whose origin you know"
        ) from None
    except Exception as error:  # a damaged pickle raises anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{file}: {problem} ({type(error).__name__}: {reason}); {AGAIN}") from None


def read_index(folder: str | Path) -> dcp.Metadata:
    """The index of one iteration's folder.

    Raises:
        UserError: it names something foreign, is damaged, or is not there.
    """
    file = Path(folder) / INDEX
    if not file.exists():
        raise UserError(f"{folder}: no {INDEX}, so not a complete distributed checkpoint; {AGAIN}")
    content = read_bytes(file, AGAIN, MAX_PICKLE_BYTES)
    with _reading(file, "not a readable checkpoint index"):
        index = _Unpickler(io.BytesIO(content), _INDEX_NAMES).load()
        if not isinstance(index, dcp.Metadata):
            raise TypeError(f"a {type(index).__name__}")
    return index


def read_common(folder: str | Path) -> dict[str, Any]:
    """The plain values (`common.pt`) of one iteration's folder.

    They may be of plain classes of megatron.core, which torch's loader takes once that package is imported.

    Raises:
        UserError: one line: not there, damaged, or names something foreign.
    """
    file = Path(folder) / COMMON
    content = read_bytes(file, AGAIN, MAX_PICKLE_BYTES)
    with _reading(file, "not readable"):
        found = _weights_only(io.BytesIO(content))
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__}, no dictionary")
    return found


def read_state(content: bytes, file: Path) -> Any:
    """The one object in a list that `torch.save` wrote into a stretch of `file`: a module's extra state, or None.

    Raises:
        UserError: one line: damaged, or names something foreign; also one level down, in FP8 state.
    """
    with _reading(file, "not readable"):
        found = _weights_only(io.BytesIO(content))
        if not isinstance(found, list) or len(found) != 1:
            raise TypeError("not one object in a list")
    with _reading(file, "FP8 state that is not readable"):
        _check_fp8(found)
    return found[0]


def _check_fp8(state: list) -> None:
    """Transformer Engine's state is a pickle inside a tensor of bytes, which it unpickles."""
    for value in torch.utils._pytree.tree_leaves(state):
        raw = b""
        if isinstance(value, io.BytesIO):
            raw = value.getvalue()
        elif isinstance(value, torch.Tensor) and (value.dtype == torch.uint8 or value is state[0]):  # of any dtype then
            raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if raw:
            _Unpickler(io.BytesIO(raw), _FP8_NAMES).load()


def _weights_only(source: BinaryIO) -> Any:
    """Numbers, text and containers that `torch.save` wrote."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises many kinds
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise _ForeignName(foreign[1]) from None
        raise
