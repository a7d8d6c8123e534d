"""The RoPE fields of a Hugging Face config, in either of the two spellings in use, as one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fuserl_megatron.config.schema import UserError
from fuserl_megatron.convert.fields import number, positive_int

# Which fields each RoPE type needs; every other known field is optional for it or unused by it.
ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ROPE_NUMBERS = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate", *ROPE_NUMBERS}


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """Rotary position parameters, whichever spelling the config used. Numbers are kept as written in the file."""

    type: str = "default"
    theta: float = 10000.0
    max_position_embeddings: int
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def read_rope(raw: dict[str, Any], max_positions: int, where: str) -> RopeParameters:
    """Read `rope_parameters` (transformers 5) or `rope_scaling` + `rope_theta` (before).

    Args:
        raw: the whole config dictionary.
        max_positions: max_position_embeddings, which stands in for a missing original length (tokens).
        where: file name for error messages.

    Raises:
        UserError: unknown type or field, missing field, or two spellings that disagree.
    """
    keys = [key for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    stated = [_rope_from(key, raw[key], raw, max_positions, where) for key in keys]
    if len(stated) == 2 and stated[0] != stated[1]:
        raise UserError(f"{where}: rope_scaling and rope_parameters disagree; keep one of them in config.json")
    return stated[0] if stated else _rope_from("rope_parameters", {}, raw, max_positions, where)


def _rope_from(key: str, given: Any, raw: dict[str, Any], max_positions: int, where: str) -> RopeParameters:
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise UserError(f"{where}: {key} = {given!r} is not supported: one flat set of RoPE fields for all layers is")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in list(ROPE_REQUIRED):
        raise UserError(f"{where}: {key}.rope_type = {kind!r} is not supported; use one of {', '.join(ROPE_REQUIRED)}")
    unknown = sorted(set(given) - ROPE_KEYS)
    if unknown:
        raise UserError(f"{where}: {key}.{unknown[0]} is not a RoPE field we know, so it cannot be honoured; remove it")
    missing = [name for name in ROPE_REQUIRED[kind] if name not in given]
    if missing:
        needs = ", ".join(ROPE_REQUIRED[kind])
        raise UserError(f"{where}: {key}.{missing[0]} is missing; rope_type {kind} needs {needs}")
    if given.get("partial_rotary_factor") not in (None, 1):
        raise UserError(
            f"{where}: {key}.partial_rotary_factor = {given['partial_rotary_factor']!r} is not supported; only 1.0 is"
        )
    numbers = {name: given[name] for name in ROPE_NUMBERS if given.get(name) is not None}
    for name, value in numbers.items():
        number(value, f"{key}.{name}", where)
    derivable = {"factor"} if kind == "yarn" else set()  # yarn: null means max_position_embeddings / original
    for name in set(ROPE_REQUIRED[kind]) - set(numbers) - derivable:
        raise UserError(f"{where}: {key}.{name} is null; rope_type {kind} needs a number")
    if kind in ("yarn", "llama3"):
        # A top-level field wins over the one inside, and the context length stands in for a missing one.
        numbers.setdefault("original_max_position_embeddings", max_positions)
        if raw.get("original_max_position_embeddings") is not None:
            numbers["original_max_position_embeddings"] = positive_int(raw, "original_max_position_embeddings", where)
    theta = given.get("rope_theta", raw.get("rope_theta", 10000.0))
    return RopeParameters(
        type=kind,
        theta=number(theta, "rope_theta", where),
        max_position_embeddings=max_positions,
        truncate=bool(given.get("truncate", True)),
        **numbers,
    )
