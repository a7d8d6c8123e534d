"""From the hydra tree in conf/ and the command line to the frozen dataclasses of `schema.py`, once.

`compose.py` lets hydra compose (defaults lists, groups, recipes, overrides); then every value is checked strictly
against the schema. The defaults live in the schema alone: a yaml file holds only what differs from them. Everything a
person can get wrong here ends in a `UserError` of one line that names the full key, the value and what would work.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from fuserl_megatron.config.compose import compose_tree
from fuserl_megatron.config.keys import about_key, all_keys, plain, plain_type
from fuserl_megatron.config.run_directory import fold
from fuserl_megatron.config.schema import BuildConfig, Config
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import nearest, show

Place = str | Path | None
SCHEMAS: dict[str, type] = {"train": Config, "build": BuildConfig}
EXAMPLES = {
    "model.path": "model.path=/models/Llama-3.1-8B-Instruct",
    "data.path": "data.path=/data/fused (the directory `fuserl build` wrote)",
    "target": "target=/models/Llama-3.1-8B-Instruct",
    "output": "output=/data/fused",
    "tokenizer": "tokenizer=/models/Llama-3.1-8B-Instruct",
    "reward_temperature": "reward_temperature=auto reward_accuracy=0.75, or a number (see docs/data_format.md)",
}
BY_BUILD = "auto is worked out by `fuserl build`; null takes the data set's own temperature, a number overrides it."


@overload
def load_config(
    kind: Literal["train"], overrides: Sequence[str] = ..., config_dir: Place = ..., config_name: str | None = ...
) -> Config: ...


@overload
def load_config(
    kind: Literal["build"],
    overrides: Sequence[str] = ...,
    config_dir: Place = ...,
    config_name: str | None = ...,
    later: Collection[str] = ...,
) -> BuildConfig: ...


def load_config(
    kind: Literal["train", "build"],
    overrides: Sequence[str] = (),
    config_dir: Place = None,
    config_name: str | None = None,
    later: Collection[str] = (),
) -> Config | BuildConfig:
    """Compose conf/, the user's own directory and the command line into one checked configuration.

    Args:
        kind: which root: "train" gives a `Config`, "build" a `BuildConfig`.
        overrides: hydra overrides such as `optim.lr=1e-6` or `recipe=llama31_8b_fusesft`.
        config_dir: the user's own directory of yaml files, searched before the shipped tree.
        config_name: root file (without .yaml) in config_dir or the shipped tree, or the path of a yaml file.
        later: required numbers that may be missing, for the caller has more to say about them: they are NaN then.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing required value, a file that is not there.
    """
    schema = SCHEMAS[kind]
    config = from_dict(schema, compose_tree(schema, config_name or kind, overrides, config_dir), later)
    return fold(config, overrides) if kind == "train" else config


def from_dict(schema: type, values: dict[str, Any], later: Collection[str] = ()) -> Any:
    """Map plain nested dictionaries onto a frozen dataclass of the schema, strictly. Keys left out take the default.

    Raises:
        UserError: unknown key, wrong type, or a required value that is still "???".
    """
    values = {name: value for name, value in values.items() if not (name in later and value == "???")}
    return _map_section(schema, values, "", set(all_keys(schema)), later)


def to_yaml(config: Any) -> str:
    """The resolved configuration as yaml, in the schema's order; `from_dict` of its parse gives an equal config."""
    import yaml

    return yaml.safe_dump(
        plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True, default_flow_style=False
    )


def _map_section(schema: type, values: Any, prefix: str, known: set[str], later: Collection[str] = ()) -> Any:
    if not isinstance(values, dict):
        path = prefix.removesuffix(".")
        names = ", ".join(prefix + field.name for field in dataclasses.fields(schema))
        raise UserError(f"{path}={show(values)}: {path} is a section; set one of its keys: {names}.")
    fields, given = {field.name: field for field in dataclasses.fields(schema)}, {}
    for name, value in values.items():
        full = f"{prefix}{name}"
        if name not in fields:
            raise UserError(f"{full}: no such key.{about_key(full, known)}")
        kind = plain_type(fields[name])
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            given[name] = _map_section(kind, value, f"{full}.", known)
        else:
            given[name] = _convert(kind, value, full, fields[name].default)
    config = schema(**given)
    for field in dataclasses.fields(schema):
        value = getattr(config, field.name)
        full = prefix + field.name
        if full not in later and (value == "???" or value != value):
            raise UserError(f"{full}: required and not set; type {EXAMPLES.get(full, full + '=...')}.")
    return config


def _convert(kind: Any, value: Any, key: str, default: Any) -> Any:
    """One leaf. Text is no number, nor is a boolean; an int is a float, and 32 is "32" where that is a choice."""
    if value == "???":
        return value
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # X | None, or X | Literal[word]
        kind, other = typing.get_args(kind)
        choices = typing.get_args(other)
        if value is None and other is types.NoneType:
            return None
        if value in choices:
            return value
        if key == "data.reward_temperature" and value == "auto":
            raise UserError(f"{key}=auto: {BY_BUILD}")
    else:
        choices = ()
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        # yaml reads on and off as booleans
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
        if text in arguments:
            return text
        raise UserError(f"{key}={show(value)}: not one of {', '.join(arguments)}.{nearest(text, arguments)}")
    if origin is tuple:
        if isinstance(value, str) and arguments[-1] is Ellipsis:
            value = [value]  # inputs=a.jsonl means inputs=[a.jsonl]
        fixed = None if arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(value, list | tuple) or (fixed is not None and len(value) != fixed):
            size = f" of {fixed}" if fixed else ""
            raise UserError(f"{key}={show(value)}: must be a list{size}, such as {key}={_sample(kind, default)}.")
        return tuple(_convert(arguments[0], item, key, None) for item in value)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise UserError(f"{key}={show(value)}: must be names with values, such as '{key}={{name: value}}'.")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind or (kind is float and math.isnan(value) and default == default):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
        words = " or ".join((words, *choices))
        raise UserError(f"{key}={show(value)}: must be {words}, such as {key}={_sample(kind, default)}.")
    return value


def _sample(kind: Any, default: Any) -> str:
    """A value that would be accepted: the default where there is one."""
    if default not in (None, "???", ()) and default == default:
        return show(default)
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        items = [_sample(argument, None) for argument in typing.get_args(kind) if argument is not Ellipsis]
        return f"[{','.join(items)}]"
    return {int: "1", float: "0.1", bool: "true", str: "name"}[kind]
