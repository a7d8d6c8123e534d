"""The account of one rendering: what the operations of a chat template cost, and where it ends.

An iteration costs `STEP` units, a call eight times that, a character or list item that is made one unit. What can grow
in a single operation is paid for before it is done. An account is as large as the conversation asks for, so no template
that prints what it is given comes near its end. The second limit is CPU time of the thread: a busy machine changes
nothing.
"""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2.utils import Namespace

WORK = 1 << 24
"""Units a rendering may use ..."""
WORK_PER_CHARACTER = 32
"""... and so many more for each character of the conversation."""
SECONDS = 5.0
"""CPU time of one rendering."""
STEP = 16
MAX_BITS = 1 << 16
"""Longest whole number."""
PERCENT_WIDTHS = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")
FORMAT_SPECS = re.compile(r":([^{}]*)([{}])")
PLAIN_NUMBERS = {"default", "d", "int", "float"}
"""Filters whose numbers are values, not widths or counts."""


class TemplateLimit(Exception):
    """A template wants more work, memory or time than it may have."""


class _Account(threading.local):
    """What is left to the rendering of this thread."""

    left = check_at = 0
    deadline = 0.0


_account = _Account()


@contextmanager
def account(num_characters: int) -> Iterator[None]:
    """Open the account of one rendering (or compilation) of a conversation with so many characters."""
    _account.left = WORK + WORK_PER_CHARACTER * num_characters
    _account.check_at = _account.left - 64 * STEP
    _account.deadline = time.thread_time() + SECONDS
    try:
        yield
    finally:
        _account.left = _account.check_at = 0


def charge(units: int) -> None:
    """Pay for work.

    Raises:
        TemplateLimit: the account is empty, or the time is over.
    """
    _account.left -= units
    if _account.left < 0:
        raise TemplateLimit("it loops or grows without end: stopped by the limit on a template's work")
    if _account.left < _account.check_at:
        _account.check_at = _account.left - 64 * STEP
        if time.thread_time() > _account.deadline:
            raise TemplateLimit(f"it took more than {SECONDS:g} s: stopped")


def charge_filter(name: str, value: Any, given: list) -> None:
    """Filters of Jinja that make more than they are given: what they are asked for, before they make it."""
    if name in PLAIN_NUMBERS:
        return
    numbers = sum(map(count_of, given))
    if name == "indent":
        charge((numbers + sum(map(size_of, given))) * (1 + str(value).count("\n")))
    elif name == "tojson":
        charge((1 + numbers + sum(map(size_of, given))) * charge_all_of([value]) // STEP)
    elif name == "round":
        charge(numbers**2)
    elif name == "format":
        charge_percent(str(value), tuple(given))
    elif name == "replace" and len(given) > 1:
        charge(str(value).count(str(given[0])) * size_of(given[1]))
    elif name == "join":
        charge(charge_all_of(value) + sum(map(size_of, given)) * len(value))
    elif name == "sum" and any(isinstance(start, list | tuple) for start in given):  # copies what it has each time
        charge(charge_all_of(value) * len(value))
    else:
        charge(numbers)


def charge_method(owner: Any, name: str, args: tuple, given: list) -> None:
    """Methods of texts and numbers that make more than they are given."""
    numbers = sum(map(count_of, given))
    if name == "join" and args:
        charge(sum(map(size_of, args[0])) + size_of(owner) * len(args[0]))
    elif name == "replace" and len(args) > 1:
        charge(owner.count(args[0]) * size_of(args[1]))
    elif name == "translate" and isinstance(args[0], dict):
        charge(size_of(owner) * max(map(size_of, args[0].values()), default=1))
    elif name == "expandtabs":
        charge((numbers or 8) * owner.count("\t" if isinstance(owner, str) else b"\t"))
    else:
        charge(numbers)


def charge_percent(text: str | bytes, values: Any) -> None:
    """`text % values`: its widths."""
    given = values if isinstance(values, tuple) else (values,)
    for widths in PERCENT_WIDTHS.findall(text if isinstance(text, str) else text.decode("latin-1")):
        charge(sum(sum(map(count_of, given)) if width == "*" else _number(width) for width in widths))


def charge_format(text: str) -> None:
    """`str.format`: its widths."""
    for spec, end in FORMAT_SPECS.findall(text):
        if end == "{":
            raise TemplateLimit("a format whose width is itself a field is not supported")
        charge(sum(map(_number, re.findall(r"\d+", spec))))


def charge_all_of(values: Any) -> int:
    """Pay for everything inside nested containers, each as often as it is printed; returns how much that is."""
    total, paid, stack = 0, 0, list(values)
    while stack:
        value = stack.pop()
        total += STEP + size_of(value)
        if total - paid > 1024 * STEP:
            charge(total - paid)
            paid = total
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list | tuple):
            stack.extend(value)
        elif isinstance(value, Namespace):
            stack.extend(value._Namespace__attrs.values())
    charge(total - paid)
    return total


def size_of(value: Any) -> int:
    """Characters or items."""
    return len(value) if isinstance(value, str | list | tuple | dict | bytes) else 0


def count_of(value: Any) -> int:
    """A whole number as a width or number of times."""
    return abs(value) if isinstance(value, int) else 0


def _number(digits: str) -> int:
    return int(digits[:18]) if digits else 0
