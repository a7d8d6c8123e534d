"""FuseRL on Megatron-core: fuse several strong language models into one smaller target (arXiv 2504.06562).

    from fuserl_megatron import build, load_config, train, evaluate, convert, LOSSES

The functions are those of library.py, LOSSES is the table of preference losses. Importing this package loads neither
torch nor megatron: each name is looked up when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuserl_megatron.library import build, convert, evaluate, load_config, train
    from fuserl_megatron.objectives import LOSSES

__version__ = "0.1.0"
__all__ = ["LOSSES", "build", "convert", "evaluate", "load_config", "train"]

_HOMES = {"LOSSES": "objectives", "build": "library", "evaluate": "library", "load_config": "library"}
_ROOMS = ("train", "convert")
"""Names of functions that are names of rooms, too: such a room can be called (util/callable_room.py)."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
