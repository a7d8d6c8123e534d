"""Text of messages: values as a person types them, the nearest known name, and text of others made safe for a
terminal, so that nothing in it moves the cursor, changes colours or begins a line of its own."""

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any

CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories: control characters, formats (which turn the direction of text), lone surrogates, line ends."""
JOINERS = "\u200c\u200d"
"""Formats that belong to words and to emoji."""


def printable(text: str, keep: str = "") -> str:
    """The text with control characters written as escapes, but for those in `keep`."""
    if text.isascii() and text.isprintable():
        return text
    kept = keep + JOINERS
    return "".join(c if c in kept or unicodedata.category(c) not in CONTROLS else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def shortened(text: str, limit: int = 200) -> str:
    """The beginning of a long text, with how long it is."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def nearest(key: str, known: Iterable[str]) -> str:
    """The question " Did you mean ...?" with the nearest full key: by the whole path first, by its last part next;
    nothing where none is near."""
    known = sorted(known)
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not match:
        last = key.rpartition(".")[2]
        by_last = {name.rpartition(".")[2]: name for name in known}
        match = [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.65)]
    return f" Did you mean {match[0]}?" if match else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a terminal; the error's class where it has none."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])


def one_line(error: BaseException) -> str:
    """The message without line breaks and indentation."""
    return " ".join(str(error).split())


def show(value: Any) -> str:
    """A value as it is typed on the command line: null, true, [1,2], text bare."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
