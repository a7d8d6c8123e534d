"""Text of others on a terminal: nothing in it moves the cursor, changes colours or begins a line of its own."""

import unicodedata

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
