"""A Jinja sandbox that ends: what a chat template may do is bounded in work, size and time.

A template comes with the model, so it is text of others. Jinja's sandbox keeps it away from files and from Python, but
not from the clock and the memory: it bounds one `range`, not two nested ones, and `'a' * 4000000000` not at all. Here
everything that can repeat or grow pays into an account (`template_account.py`).

The output is what Jinja prints without these limits, character for character: only counting is added to the
template's syntax tree, in filters whose names no template can write.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from fuserl_megatron.records.template_account import (
    MAX_BITS,
    STEP,
    TemplateLimit,
    charge,
    charge_all_of,
    charge_filter,
    charge_format,
    charge_method,
    charge_percent,
    count_of,
    size_of,
)

LOOPED, PRINTED, MADE, LITERAL = " looped", " printed", " made", " literal"


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
            charge(size_of(left) + size_of(right))
        elif operator == "*":
            charge(size_of(left) * count_of(right) + size_of(right) * count_of(left))
        elif operator == "%" and isinstance(left, str | bytes):
            charge_percent(left, right)
        result = super().call_binop(context, operator, left, right)
        charge(size_of(result) if operator == "%" else 1)
        return result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        """A call from the template: macros, methods, functions."""
        owner = getattr(__obj, "__self__", None)
        charge(8 * STEP + size_of(owner) // 8)
        given = [*args, *kwargs.values()]
        if isinstance(owner, str | bytes | int):
            if __obj.__name__ == "join" and len(args) == 1:
                args = (list(args[0]),)
            charge_method(owner, __obj.__name__, args, given)
        elif __obj is __self.globals.get("lipsum"):
            charge(10_000 * sum(map(count_of, given)))
        containers = [value for value in given if isinstance(value, list | tuple | dict | Namespace)]
        if len(containers) > 1:
            charge_all_of(containers)
        charge(sum(map(size_of, containers)))
        result = super().call(__context, __obj, *args, **kwargs)
        charge(size_of(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` as the sandbox allows it, with its widths paid for."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @wraps(wrapped)
        def limited(*args: Any, **kwargs: Any) -> str:
            charge_format(value.__self__)
            return wrapped(*args, **kwargs)

        return limited


class _Counting(NodeTransformer):
    """Adds the counting filters to a template's syntax tree."""

    def __init__(self, env: LimitedEnvironment):
        self.env = env

    def counted(self, node: Any, name: str) -> nodes.Filter:
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

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self.visit_made(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    visit_List = visit_Dict = visit_Tuple = visit_Concat = visit_made


class _looped(list):  # noqa: N801 - a filter
    """What a loop goes through: as long as it was, paid for as it goes."""

    def __iter__(self) -> Iterator[Any]:
        charge(STEP)
        for item in super().__iter__():
            charge(STEP)
            yield item


def _made(value: Any) -> Any:
    charge(size_of(value) if isinstance(value, str) else charge_all_of([value]))
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
        charge(STEP + size_of(value) // 8)
        if name in ("join", "sum") and not isinstance(value, str):
            value = list(value)
            args = (*args[:passes], value, *rest)
        charge_filter(name, value, given)
        result = filter_(*args, **kwargs)
        if name in ("batch", "slice", "groupby"):
            result = list(result)
            charge_all_of(result)
        charge(size_of(result))
        return result

    return limited
