"""Checks on single fields of a `config.json`; every refusal names the file, the field, its value and the rule."""

from typing import Any

from fuserl_megatron.config.schema import UserError


def positive_int(raw: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    """raw[key] as a positive integer; a missing or null field takes the default, and without one is refused."""
    value = raw.get(key, default)
    if value is None:
        raise UserError(f"{where}: {key} is missing; is this the config.json of a causal language model?")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {key} = {value!r} must be a positive integer")
    return value


def number(value: Any, key: str, where: str) -> float:
    """The value itself (int or float, as written), refused unless positive and finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UserError(f"{where}: {key} = {value!r} must be a positive, finite number")
    return value


def flag(raw: dict[str, Any], key: str, where: str) -> bool:
    """raw[key] as a boolean; missing or null is false."""
    value = raw.get(key, False)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{where}: {key} = {value!r} must be true or false")
    return bool(value)
