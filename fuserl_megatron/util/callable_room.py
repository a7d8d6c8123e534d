"""Rooms that can be called: `fuserl_megatron.train` is the room of the training run and the library's function.

Importing a submodule sets it as attribute of its package, so a function of the same name would be replaced by the room
at the first import from it. The room is therefore both, by Python's way to give a module a class of its own.
"""

import importlib
import sys
import types
from typing import Any


class CallableRoom(types.ModuleType):
    """A package whose call is the function of the same name in library.py."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the library's function."""
        top, _, name = self.__name__.rpartition(".")
        return getattr(importlib.import_module(f"{top}.library"), name)(*args, **kwargs)


def make_callable(name: str) -> None:
    """Let the package of this name be called."""
    sys.modules[name].__class__ = CallableRoom
