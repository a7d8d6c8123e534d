"""A user's own object, named by `package.module:object`: losses, metrics, readers, launchers (docs/extending.md)."""

import importlib
from typing import Any

from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import first_line, nearest


def is_named(text: str) -> bool:
    """Whether the text is meant as a `package.module:object`."""
    return ":" in text


def load_named(name: str, setting: str) -> Any:
    """The object that `name` stands for, its module imported.

    Args:
        name: package.module:object; object may be an attribute of an object (Class.method).
        setting: the key that holds the name, for messages.

    Raises:
        UserError: one line: it is no such name, the module is not there or fails, or it has no such object.
    """
    module_name, _, path = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise UserError(f"{setting}={name}: must be package.module:object, such as my_losses:apo_zero.")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{setting}={name}: {module_name} needs {error.name}, which is not installed.") from None
        raise UserError(
            f"{setting}={name}: there is no module {error.name}; install it, or put its folder on PYTHONPATH."
        ) from None
    except Exception as error:  # whatever the user's module raises
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{setting}={name}: importing {module_name} fails with {what}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            near = nearest(part, [known for known in vars(found) if not known.startswith("_")])
            raise UserError(f"{setting}={name}: {module_name} has no {path}.{near}")
        found = getattr(found, part)
    return found
