"""A Jinja sandbox that ends: what a chat template may do is counted, and bounded in work, size and time.

A template comes with the model, so it is text of others. Jinja's sandbox keeps it away from files and from Python, but
not from the clock and the memory: it bounds one `range`, not two nested ones, and `'a' * 4000000000` not at all.

Everything that can repeat or grow pays into one account a rendering: an iteration or a call `STEP` units, a character
or list item that is made one unit. What grows in a single operation (`*`, `**`, `center`, `replace`, ...) pays before
it is done. An account is as large as the conversation asks for, so no template that only prints what it is given comes
near. The thread's CPU time is the second limit, so a busy machine changes nothing.

The output is what Jinja prints without these limits, character for character: only counting is added to the
template's syntax tree, in filters whose names no template can write.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

WORK = 1 << 26
"""Units a rendering may use ..."""
WORK_PER_CHARACTER = 64
"""... and so many more for each character of the conversation."""
SECONDS = 10.0
"""CPU time of one rendering."""
STEP = 16
MAX_BITS = 1 << 16
"""Longest whole number."""
LOOPED, PRINTED, MADE, LITERAL = " looped", " printed", " made", " literal"
PERCENT_WIDTHS = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")
FORMAT_SPECS = re.compile(r":([^{}]*)([{}])")
PLAIN_NUMBERS = {"default", "d", "int", "float", "sum"}
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
    _account.check_at = _account.left
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
        _account.check_at = _account.left - 1024 * STEP
        if time.thread_time() > _account.deadline:
            raise TemplateLimit(f"it took more than {SECONDS:g} s: stopped")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the account. Made from another environment, whose settings it takes over."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    @classmethod
    def like(cls, other: ImmutableSandboxedEnvironment) -> "LimitedEnvironment":
        """An environment with the extensions, filters, globals and settings of `other`, and the limits."""
        env = cls.__new__(cls)
        env.__dict__.update(other.__dict__)
        env.extensions = {name: extension.bind(env) for name, extension in other.extensions.items()}
        env.globals = dict(other.globals)
        env.filters = {name: _limited_filter(name, filter_) for name, filter_ in other.filters.items()}
        env.filters |= {LOOPED: _looped, PRINTED: _printed, MADE: _made, LITERAL: _literal}
        env.cache = None
        return env

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counting(self).visit(source), *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator that can grow, paid for before it is done."""
        if isinstance(left, int) and isinstance(right, int):
            if operator == "*" and left.bit_length() + right.bit_length() > MAX_BITS:
                raise TemplateLimit("a whole number grows without end: stopped")
            if operator == "**" and left.bit_length() * max(right, 1) > MAX_BITS:
                raise TemplateLimit("a whole number grows without end: stopped")
        elif operator == "+":
            charge(_size(left) + _size(right))
        elif operator == "*":
            charge(_size(left) * _count(right) + _size(right) * _count(left))
        elif operator == "%" and isinstance(left, str | bytes):
            _charge_percent(left, right)
        result = super().call_binop(context, operator, left, right)
        charge(_size(result) if operator == "%" else 1)
        return result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        """A call from the template: macros, methods, functions."""
        owner = getattr(__obj, "__self__", None)
        charge(STEP + _size(owner) // 8)
        given = [*args, *kwargs.values()]
        if isinstance(owner, str | bytes | int):
            if __obj.__name__ == "join" and len(args) == 1:
                args = (list(args[0]),)
            _charge_method(owner, __obj.__name__, args, given)
        elif __obj is __self.globals.get("lipsum"):
            charge(10_000 * sum(map(_count, given)))
        containers = [value for value in given if isinstance(value, list | tuple | dict | Namespace)]
        if len(containers) > 1:
            _charge_all_of(containers)
        charge(sum(map(_size, containers)))
        result = super().call(__context, __obj, *args, **kwargs)
        charge(_size(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` as the sandbox allows it, with its widths paid for."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @wraps(wrapped)
        def limited(*args: Any, **kwargs: Any) -> str:
            for spec, end in FORMAT_SPECS.findall(value.__self__):
                if end == "{":
                    raise TemplateLimit("a format whose width is itself a field is not supported")
                charge(sum(map(_number, re.findall(r"\d+", spec))))
            return wrapped(*args, **kwargs)

        return limited


class _Counting(NodeTransformer):
    """Adds the counting filters to a template's syntax tree."""

    def __init__(self, env: LimitedEnvironment):
        self.env = env

    def counted(self, node: nodes.Expr, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self.env)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = self.counted(node.iter, LOOPED)
        for output in nodes.Template(node.body).find_all(nodes.Output):
            size = sum(len(n.data) for n in output.nodes if isinstance(n, nodes.TemplateData))
            if size and getattr(output.nodes[-1], "name", "") != LITERAL:  # else an inner loop's, marked already
                number = nodes.Const(size, lineno=output.lineno, environment=self.env)
                output.nodes.append(self.counted(number, LITERAL))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [n if isinstance(n, nodes.TemplateData) else self.counted(n, PRINTED) for n in node.nodes]
        return node

    def visit_made(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self.counted(node, MADE)

    visit_List = visit_Dict = visit_Tuple = visit_Concat = visit_made


def _looped(iterable: Any) -> list:
    items = list(iterable)
    charge(STEP * (1 + len(items)))
    return items


def _made(value: Any) -> Any:
    charge(_size(value) if isinstance(value, str) else _charge_all_of([value]))
    return value


@pass_context  # a filter that sees the context is not computed once and for all when the template is compiled
def _printed(context: Any, value: Any) -> Any:
    return _made(value)


@pass_context
def _literal(context: Any, size: int) -> str:
    charge(size)
    return ""


def _limited_filter(name: str, filter_: Callable) -> Callable:
    """`filter_`, paid for: its numbers are widths or counts, what it makes has a size."""
    passes = getattr(filter_, "jinja_pass_arg", None) is not None

    @wraps(filter_)  # carries the mark by which Jinja knows what to pass
    def limited(*args: Any, **kwargs: Any) -> Any:
        value, *rest = args[passes:] or (None,)
        given = [*rest, *kwargs.values()]
        charge(STEP + _size(value) // 8)
        if name not in PLAIN_NUMBERS:
            _charge_filter(name, value, given)
        result = filter_(*args, **kwargs)
        if name in ("batch", "slice", "groupby"):
            result = list(result)
            _charge_all_of(result)
        charge(_size(result))
        return result

    return limited


def _charge_filter(name: str, value: Any, given: list) -> None:
    numbers = sum(map(_count, given))
    if name == "indent":
        charge((numbers + sum(map(_size, given))) * (1 + str(value).count("\n")))
    elif name == "tojson":
        charge((1 + numbers + sum(map(_size, given))) * (1 + _charge_all_of([value])))
    elif name == "round":
        charge(numbers**2)
    elif name == "format":
        _charge_percent(str(value), tuple(given))
    elif name == "replace" and len(given) > 1:
        charge(str(value).count(str(given[0])) * _size(given[1]))
    elif name == "join":
        charge((1 + sum(map(_size, given))) * _size(value))
    else:
        charge(numbers)


def _charge_method(owner: str | bytes | int, name: str, args: tuple, given: list) -> None:
    """Methods of texts and numbers that make more than they are given."""
    numbers = sum(map(_count, given))
    if name == "join" and args:
        charge(sum(map(_size, args[0])) + _size(owner) * len(args[0]))
    elif name == "replace" and len(args) > 1:
        charge(owner.count(args[0]) * _size(args[1]))
    elif name == "translate":
        charge(_size(owner) * max((_size(v) for v in args[0].values()), default=1) if isinstance(args[0], dict) else 1)
    elif name == "expandtabs":
        charge((numbers or 8) * owner.count("\t" if isinstance(owner, str) else b"\t"))
    else:
        charge(numbers)


def _charge_percent(text: str | bytes, values: Any) -> None:
    given = values if isinstance(values, tuple) else (values,)
    for widths in PERCENT_WIDTHS.findall(text if isinstance(text, str) else text.decode("latin-1")):
        charge(sum(sum(map(_count, given)) if width == "*" else _number(width) for width in widths))


def _charge_all_of(values: Any) -> int:
    """Pay for everything inside nested containers, each as often as it is printed; returns how much that is."""
    total, stack = 0, list(values)
    while stack:
        value = stack.pop()
        size = 1 + _size(value)
        total += size
        charge(size)
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list | tuple):
            stack.extend(value)
        elif isinstance(value, Namespace):
            stack.extend(value._Namespace__attrs.values())
    return total


def _size(value: Any) -> int:
    """Characters or items."""
    return len(value) if isinstance(value, str | list | tuple | dict | bytes) else 0


def _count(value: Any) -> int:
    """A whole number as a width or number of times."""
    return abs(value) if isinstance(value, int) else 0


def _number(digits: str) -> int:
    return int(digits[:18]) if digits else 0
