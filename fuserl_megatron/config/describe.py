"""Every setting with its type, default and meaning, read off the dataclasses: `fuserl keys` and docs/settings.md."""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fuserl_megatron.util.text import show


@dataclass(frozen=True)
class Setting:
    """One key."""

    command: str
    key: str
    type: str
    default: str
    """As it is typed; empty where the user must give it."""
    meaning: str


def commands() -> dict[str, tuple[type, ...]]:
    """The dataclasses behind each command; one of several for settings that lie in files of their own."""
    from fuserl_megatron.config.launch_sections import LaunchConfig
    from fuserl_megatron.config.sample_sections import LogprobsConfig, SampleConfig, SourceConfig
    from fuserl_megatron.config.schema import BuildConfig, Config
    from fuserl_megatron.config.score_sections import KINDS, ScoreConfig

    return {
        "train": (Config,),
        "build": (BuildConfig,),
        "sample": (SampleConfig, SourceConfig),
        "logprobs": (LogprobsConfig,),
        "score": (ScoreConfig, *KINDS.values()),
        "launch": (LaunchConfig,),
    }


PREFIXES = {
    "SourceConfig": "sources.NAME.",
    "ModelReward": "rewards.MODEL.",
    "EndpointReward": "rewards.ENDPOINT.",
    "RuleReward": "rewards.RULE.",
}
"""Where the settings of one source or reward stand on the command line."""


def settings(command: str | None = None) -> Iterator[Setting]:
    """Every setting of a command, or of all, in the order of the schema."""
    for name, schemas in commands().items():
        if command in (None, name):
            for schema in schemas:
                yield from _of_section(name, schema, PREFIXES.get(schema.__name__, ""))


def _of_section(command: str, schema: type, prefix: str) -> Iterator[Setting]:
    meanings, hints = _meanings(schema), typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            yield from _of_section(command, typing.cast(type, field.type), f"{prefix}{field.name}.")
            continue
        given = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            given = field.default_factory()
        required = given == "???" or given != given
        default = "" if required else "{}" if given == {} else show(given)
        yield Setting(command, prefix + field.name, _type(hints[field.name]), default, meanings.get(field.name, ""))


def _meanings(schema: type) -> dict[str, str]:
    """The string under each field, those of the classes it is made of included."""
    found, name = {}, None
    for part in reversed([part for part in schema.__mro__ if dataclasses.is_dataclass(part)]):
        for node in typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name is not None:
                found[name] = " ".join(str(node.value.value).split())
        name = None
    return found


def _type(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(show(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if part is type(None) else _type(part) for part in parts)
    if origin is typing.Annotated:
        return _type(parts[0])
    if origin in (tuple, list):
        return f"[{_type(parts[0])}, ...]"
    if origin is dict:
        return "{name: value}"
    return {str: "text", bool: "true | false"}.get(hint, getattr(hint, "__name__", str(hint)))
