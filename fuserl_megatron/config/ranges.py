"""Ranges of single settings, written at their fields: `lr: Annotated[float, positive()] = 5e-6`."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fuserl_megatron.config.keys import seconds_of
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import show

DEFAULT: Any = object()
"""Of `works`: the field's default would work."""


@dataclass(frozen=True)
class Range:
    """What a value must be. null, where a field allows it, is always in the range."""

    holds: Callable[[Any], bool]
    rule: str
    """The words of the error."""
    works: Any = DEFAULT
    """A value that would work, for the error."""


def at_least(least: int, works: Any = DEFAULT, rule: str | None = None) -> Range:
    """A number from `least` on."""
    return Range(lambda value: value >= least, rule or f"must be at least {least}", works)


def positive(works: Any = DEFAULT) -> Range:
    """A finite number above zero."""
    return Range(lambda value: value > 0 and math.isfinite(value), "must be a positive number", works)


def not_negative(works: Any = DEFAULT) -> Range:
    """A finite number, zero or more."""
    rule = "must not be negative or infinite"
    return Range(lambda value: value >= 0 and math.isfinite(value), rule, works)


def share() -> Range:
    """A number in [0, 1)."""
    return Range(lambda value: 0 <= value < 1, "must lie in [0, 1)")


def _is_duration(text: str) -> bool:
    try:
        return seconds_of(text) > 0
    except ValueError:
        return False


SHARES = Range(lambda values: all(0 <= value < 1 for value in values), "must lie in [0, 1)")
"""A list of numbers in [0, 1)."""
DURATION = Range(_is_duration, "must be DD:HH:MM:SS", "00:03:50:00")


def check_ranges(config: Any, prefix: str = "") -> None:
    """Check every field of a configuration and its sections that has a range.

    Raises:
        UserError: the first value outside, with the rule and a value that would work.
    """
    for field in dataclasses.fields(config):
        key, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
        for limit in getattr(field.type, "__metadata__", ()):
            if value is not None and not limit.holds(value):
                works = field.default if limit.works is DEFAULT else limit.works
                raise UserError(f"{key}={show(value)}: {limit.rule}; {key}={show(works)} would work.")
