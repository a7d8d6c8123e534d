"""The keys of the settings: all of them, those that hold a user's own names, and what to say of one that is none."""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fuserl_megatron.config.peer_names import peer_advice
from fuserl_megatron.util.text import nearest


def plain_type(field: dataclasses.Field) -> Any:
    """A field's type without its range."""
    return typing.get_args(field.type)[0] if typing.get_origin(field.type) is typing.Annotated else field.type


@functools.cache
def all_keys(schema: type, prefix: str = "") -> tuple[str, ...]:
    """Every key of the schema with its full path, sections included."""
    keys = []
    for field in dataclasses.fields(schema):
        keys.append(prefix + field.name)
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            keys.extend(all_keys(field.type, f"{prefix}{field.name}."))
    return tuple(keys)


def holds_own_names(key: str, schema: type) -> bool:
    """Whether a key lies in one that holds names of the user's own (`chat_template_kwargs.enable_thinking`)."""
    section, _, rest = key.partition(".")
    kind = {field.name: field.type for field in dataclasses.fields(schema)}.get(section)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return holds_own_names(rest, kind)
    return typing.get_origin(kind) is dict


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested dictionaries hold, with the dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def about_key(key: str, known: Iterable[str]) -> str:
    """For a key that does not exist: the one with its last part, what other trainers' name for it is here (or why
    there is none), or the nearest."""
    known = sorted(known)
    same = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f" Did you mean {same[0]}?" if same else peer_advice(key, known) or nearest(key, known)


def seconds_of(duration: str) -> int:
    """Seconds of NeMo's DD:HH:MM:SS.

    Raises:
        ValueError: it is not of that form.
    """
    days, hours, minutes, seconds = map(int, duration.split(":"))
    if min(days, hours, minutes, seconds) < 0:
        raise ValueError(duration)
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def plain(value: Any) -> Any:
    """Tuples to lists and required NaN to "???", as yaml and omegaconf want them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return "???" if isinstance(value, float) and math.isnan(value) else value
