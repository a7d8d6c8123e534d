"""Files that others wrote, above all JSON: whatever can be wrong with one becomes one line for the user.

Python's JSON reader raises more than JSONDecodeError: a plain ValueError for an integer of more than 4,300 digits, a
RecursionError for nesting, a UnicodeDecodeError for what is not UTF-8; and it lets nesting pass that printing or
writing the value later stumbles over. A name may lead to a pipe, which never ends, or to a file that fills the memory.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from fuserl_megatron.util.errors import UserError

MAX_BYTES = 256 * 2**20
"""The largest JSON file that is read: the weight index of the largest models has some 10 MB."""
MAX_DEPTH = 64
"""Of nesting: nothing that belongs to a model comes near."""


class BadFile(UserError):
    """A file from outside that is not there or not what it should be; `reason` is the line without path and advice."""

    def __init__(self, path: str | Path, reason: str, advice: str):
        super().__init__(f"{path}: {reason}" + (f"; {advice}" if advice else ""))
        self.reason = reason


def is_plain_name(name: str) -> bool:
    """Whether a name that a file of others gives is one of a file beside it: no path that leads anywhere else."""
    return name not in ("", ".", "..") and "/" not in name and os.sep not in name and "\0" not in name


def read_bytes(path: str | Path, advice: str = "", limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file, of at most `limit` bytes.

    Raises:
        BadFile: one line, which ends with the advice: not there, not a regular file (a pipe would never end), too
            large, or not readable.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            found = os.fstat(file.fileno())
            content = file.read(limit + 1) if stat.S_ISREG(found.st_mode) else None
    except FileNotFoundError:
        raise BadFile(path, "no such file", advice) from None
    except IsADirectoryError:
        content = None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadFile(path, f"cannot be read ({getattr(error, 'strerror', None) or error})", advice) from None
    if content is None:
        raise BadFile(path, "not a regular file", advice)
    if len(content) > limit:
        raise BadFile(path, f"{found.st_size} bytes, more than the {limit} that are read", advice)
    return content


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would be waited for


def parse_json(content: bytes | str, path: str | Path, what: str = "a JSON object", advice: str = "") -> dict[str, Any]:
    """A JSON object out of text that somebody else wrote.

    Args:
        content: the text; bytes are UTF-8.
        path: where it is from, for the message.
        what: what it should be, for the message.
        advice: what to do, the end of the message.

    Raises:
        BadFile: it is no JSON, or no object, or is nested more than MAX_DEPTH deep.
    """
    try:
        found = json.loads(content if isinstance(content, str) else content.decode("utf-8"))
    except RecursionError:
        raise BadFile(path, f"not {what} (nested too deeply)", advice) from None
    except ValueError as error:  # also integers of too many digits, and bytes that are not UTF-8
        reason = str(error).partition("; use sys.")[0]
        raise BadFile(path, f"not {what} ({reason})", advice) from None
    if not isinstance(found, dict):
        raise BadFile(path, f"holds a {type(found).__name__}, not a JSON object", advice)
    if not _is_flat(found):
        raise BadFile(path, f"not {what} (nested too deeply)", advice)
    return found


def _is_flat(found: Any) -> bool:
    level = [found]
    for _ in range(MAX_DEPTH):
        values = (item.values() if isinstance(item, dict) else item for item in level)
        level = [value for inner in values for value in inner if isinstance(value, dict | list)]
        if not level:
            return True
    return False


def read_json(
    path: str | Path, what: str = "a JSON object", advice: str = "", limit: int = MAX_BYTES
) -> dict[str, Any]:
    """The JSON object in a file; arguments and errors as of `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, advice, limit), path, what, advice)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Readable JSON, fields in their order; half a surrogate, which JSON allows and UTF-8 does not, stays escaped."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    Path(path).write_bytes(text.encode("utf-8", "backslashreplace"))
