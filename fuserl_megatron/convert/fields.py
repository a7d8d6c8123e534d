"""Checks on single fields of a `config.json`; every refusal names the file, the field, its value and the rule."""

from collections.abc import Mapping
from typing import Any

from fuserl_megatron.util.errors import UserError

MAX_SIZE = 2**31 - 1
"""No size of a model comes near; larger ones only fill the memory, or do not fit a tensor's own integers."""


def positive_int(raw: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """raw[key] as a positive integer up to MAX_SIZE; a missing field takes the default, and without one is refused.

    So is null: transformers does not put its default there either.
    """
    value = raw.get(key, default)
    if value is None:
        raise UserError(f"{where}: {key} is missing or null; is this the config.json of a causal language model?")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
        raise UserError(f"{where}: {key} = {value!r} must be a positive integer, at most {MAX_SIZE}")
    return value


def number(value: Any, key: str, where: str) -> float:
    """The value itself (int or float, as written), refused unless it is a positive, finite float."""
    try:
        good = not isinstance(value, bool) and isinstance(value, int | float) and 0 < float(value) < float("inf")
    except OverflowError:  # an integer beyond all floats
        good = False
    if not good:
        raise UserError(f"{where}: {key} = {value!r} must be a positive, finite number")
    return value


def flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    """raw[key] as a boolean; missing or null is false."""
    value = raw.get(key, False)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{where}: {key} = {value!r} must be true or false")
    return bool(value)


def layer_list(raw: Mapping[str, Any], key: str, num_layers: int, kinds: tuple[Any, ...], where: str) -> list | None:
    """raw[key] as a list with one of `kinds` for each layer; None where it is missing, null or empty."""
    listed = raw.get(key)
    if not listed:
        return None
    if not isinstance(listed, list) or any(kind not in kinds for kind in listed):
        raise UserError(f"{where}: {key} = {listed!r} is not supported: a list of {', '.join(map(str, kinds))} is")
    if len(listed) != num_layers:
        raise UserError(f"{where}: {key} names {len(listed)} layers, and num_hidden_layers = {num_layers}")
    return listed
