"""Pickles from outside, read without running what they bring along.

A distributed checkpoint holds three kinds: the index (`.metadata`), the plain values (`common.pt`) and, inside the
files of numbers, a few bytes of extra state per module. Core reads the first and the last with plain pickle, which
calls whatever they name. So `check_pickles` reads the same bytes first, knowing a short list of harmless names; any
other name is refused and nothing is called. Numbers are only ever read by torch's weights-only loader.

That somebody exchanges a file between the check and core's own reading is not guarded against: who may write into the
folder while a run reads it can do worse things more simply.
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

from fuserl_megatron.config.schema import UserError
from fuserl_megatron.mcore.dist_format import COMMON, INDEX

AGAIN = "copy the checkpoint again, or name another iteration"


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
    with _reading(file, "not a readable checkpoint index"), open(file, "rb") as stream:
        return _Unpickler(stream, _INDEX_NAMES).load()


def check_pickles(folder: str | Path) -> None:
    """Refuse a checkpoint that would make core call anything foreign. Called before core opens the folder.

    Raises:
        UserError: one line with the file and the name in it; also for pickles that are damaged.
    """
    import megatron.core  # noqa: F401  (tells torch's loader the plain classes of its common.pt)

    folder = Path(folder)
    index = read_index(folder)
    if (folder / COMMON).exists():  # core 0.19 keeps these values among the others
        with _reading(folder / COMMON, "not readable"):
            _weights_only(folder / COMMON)
    try:
        small = {key for key, entry in index.state_dict_metadata.items() if isinstance(entry, dcp.BytesStorageMetadata)}
        places = [(key.fqn, place) for key, place in index.storage_data.items() if key.fqn in small]
    except (AttributeError, TypeError):
        raise UserError(f"{folder / INDEX}: not a checkpoint index; {AGAIN}") from None
    for key, place in places:
        file = folder / Path(place.relative_path).name
        try:
            with open(file, "rb") as stream:
                stream.seek(place.offset)
                content = stream.read(place.length)
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{file}: {key} cannot be read ({error}); {AGAIN}") from None
        with _reading(file, "not readable"):
            state = _weights_only(io.BytesIO(content))
        with _reading(file, "FP8 state that is not readable"):
            _check_fp8(state)


def _check_fp8(state: Any) -> None:
    """Transformer Engine's state is a pickle inside a tensor of bytes, which it unpickles."""
    for value in torch.utils._pytree.tree_leaves(state):
        raw = b""
        if isinstance(value, io.BytesIO):
            raw = value.getvalue()
        elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
            raw = value.numpy().tobytes()
        if raw:
            _Unpickler(io.BytesIO(raw), _FP8_NAMES).load()


def _weights_only(source: Path | BinaryIO) -> Any:
    """Numbers, text and containers that `torch.save` wrote."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises many kinds
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise _ForeignName(foreign[1]) from None
        raise
