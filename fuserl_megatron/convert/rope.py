"""RoPE: the fields of a Hugging Face config in either of the two spellings in use, and the frequencies they give.

The frequencies are computed operation for operation as transformers does: fp32 results agree to the last bit.
Megatron-core's own rotary module knows only the `factor` of Llama 3 scaling (its three other fields are constants
there) and no linear or dynamic scaling; a model trained with wrong frequencies is silently a different model.
Everything here is a pure function of the config's fields. Legend: D dimensions of one attention head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from fuserl_megatron.convert.fields import number, positive_int
from fuserl_megatron.util.errors import UserError

# Which fields each RoPE type needs; every other known field is optional for it or unused by it.
ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


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
    divisors: tuple[float, ...] = ()
    """longrope: of each frequency, for sequences of up to original_max_position_embeddings tokens (`short_factor`)."""

    @property
    def max_tokens(self) -> int:
        """The longest sequence that these frequencies are for."""
        if self.type == "longrope" and self.original_max_position_embeddings is not None:
            return min(self.max_position_embeddings, int(self.original_max_position_embeddings))
        return self.max_position_embeddings


ROPE_NUMBERS = tuple(field.name for field in fields(RopeParameters) if field.default is None)
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate", "short_factor", "long_factor"}
ROPE_KEYS |= set(ROPE_NUMBERS)


def read_rope(raw: Mapping[str, Any], max_positions: int, head_dim: int, where: str) -> RopeParameters:
    """Read `rope_parameters` (transformers 5) or `rope_scaling` + `rope_theta` (before) of the whole config dictionary.

    max_position_embeddings (tokens) stands in for a missing original length; `where` names the file in errors.

    Raises:
        UserError: unknown type or field, missing field, two spellings that disagree, or numbers whose frequencies for
            this head_dim are not positive and finite in fp32.
    """
    keys = [key for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    stated = [_rope_from(key, raw[key], raw, max_positions, where) for key in keys]
    if len(stated) == 2 and stated[0] != stated[1]:
        raise UserError(f"{where}: rope_scaling and rope_parameters disagree; keep one of them in config.json")
    rope = stated[0] if stated else _rope_from("rope_parameters", {}, raw, max_positions, where)
    try:
        frequencies, scaling = rope_inverse_frequencies(rope, head_dim)
        usable = bool(((frequencies > 0) & frequencies.isfinite()).all()) and 0 < scaling < math.inf
    except (ArithmeticError, ValueError, RuntimeError):  # RuntimeError: torch's word for an integer of over 64 bits
        usable = False
    if not usable:
        said = ", ".join(f"{name} = {value}" for name, value in vars(rope).items() if value is not None)
        raise UserError(f"{where}: RoPE frequencies are not positive and finite with {said}; correct config.json")
    return rope


def _rope_from(key: str, given: Any, raw: Mapping[str, Any], max_positions: int, where: str) -> RopeParameters:
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise UserError(f"{where}: {key} = {given!r} is not supported: one flat set of RoPE fields for all layers is")
    kind = given.get("rope_type", given.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # as Phi-3's first configs call it
    if kind not in list(ROPE_REQUIRED):
        raise UserError(f"{where}: {key}.rope_type = {kind!r} is not supported; use one of {', '.join(ROPE_REQUIRED)}")
    unknown = sorted(set(given) - ROPE_KEYS)
    if unknown:
        raise UserError(f"{where}: {key}.{unknown[0]} is not a RoPE field we know, so it cannot be honoured; remove it")
    missing = [name for name in ROPE_REQUIRED[kind] if name not in given]
    if missing:
        needs = ", ".join(ROPE_REQUIRED[kind])
        raise UserError(f"{where}: {key}.{missing[0]} is missing; rope_type {kind} needs {needs}")
    numbers = {name: given[name] for name in ROPE_NUMBERS if given.get(name) is not None}
    for name, value in numbers.items():
        number(value, f"{key}.{name}", where)
    derivable = {"factor"} if kind == "yarn" else set()  # yarn: null means max_position_embeddings / original
    divisors: tuple[float, ...] = ()
    if kind == "longrope":
        divisors, derivable = (
            _divisors(given["short_factor"], f"{key}.short_factor", where),
            {"short_factor", "long_factor"},
        )
    for name in set(ROPE_REQUIRED[kind]) - set(numbers) - derivable:
        raise UserError(f"{where}: {key}.{name} is null; rope_type {kind} needs a number")
    if kind in ("yarn", "llama3", "longrope"):
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
        divisors=divisors,
        **numbers,
    )


def _divisors(given: Any, key: str, where: str) -> tuple[float, ...]:
    if not isinstance(given, list):
        raise UserError(f"{where}: {key} = {given!r} must be a list of numbers, one for each frequency")
    return tuple(float(number(value, key, where)) for value in given)


def rope_inverse_frequencies(rope: RopeParameters, head_dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and the factor on cos and sin, for sequences of up to max_position_embeddings tokens.

    The angle of pair d at position p is p * inv_freq[d]; cos and sin are then multiplied by the attention scaling.
    Sources of the formulas: RoPE arXiv 2104.09864; linear 2306.15595; yarn 2309.00071; dynamic and llama3 as in
    transformers, where they were first written down. `dynamic` stretches the base beyond max_position_embeddings only:
    up to there its frequencies are the unscaled ones, whatever its factor says. `longrope` (2402.13753) has two sets:
    these are for sequences of up to original_max_position_embeddings tokens, and `max_tokens` allows no longer ones.

    Returns:
        (inv_freq [D/2] in fp32 radians per position, attention scaling without unit).
    """
    periods_D2 = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match rope.type:
        case "default" | "dynamic":
            return 1.0 / periods_D2, 1.0
        case "linear":
            return 1.0 / periods_D2 / _stated(rope.factor), 1.0
        case "llama3":
            return _llama3(rope, 1.0 / periods_D2), 1.0
        case "yarn":
            return _yarn(rope, head_dim, periods_D2)
        case "longrope":
            return 1.0 / (torch.tensor(rope.divisors) * periods_D2), _longrope_scaling(rope)
    raise ValueError(f"rope type {rope.type!r} is not one of default, linear, dynamic, yarn, llama3, longrope")


def _stated(number: float | None) -> float:
    """A number that this type of RoPE has: `read_rope` saw to it."""
    assert number is not None
    return number


def _llama3(rope: RopeParameters, inv_freq_D2: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    original, factor = _stated(rope.original_max_position_embeddings), _stated(rope.factor)
    low, high = _stated(rope.low_freq_factor), _stated(rope.high_freq_factor)
    wavelength_D2 = 2 * math.pi / inv_freq_D2
    is_long_D2 = wavelength_D2 > original / low
    is_short_D2 = wavelength_D2 < original / high
    scaled_D2 = torch.where(is_long_D2, inv_freq_D2 / factor, inv_freq_D2)
    share_D2 = (original / wavelength_D2 - low) / (high - low)
    between_D2 = (1 - share_D2) * scaled_D2 / factor + share_D2 * scaled_D2
    return torch.where(is_long_D2 | is_short_D2, scaled_D2, between_D2)


def _longrope_scaling(rope: RopeParameters) -> float:
    """The factor on cos and sin, arXiv 2402.13753; it belongs to short sequences too."""
    original = _stated(rope.original_max_position_embeddings)
    factor = rope.max_position_embeddings / original if rope.factor is None else rope.factor
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _yarn(rope: RopeParameters, head_dim: int, periods_D2: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Dimensions turning often in the original context are kept, slow ones interpolated, a ramp between."""
    original = _stated(rope.original_max_position_embeddings)
    factor = rope.max_position_embeddings / original if rope.factor is None else rope.factor

    def dimension_with(turns: float) -> float:
        return (head_dim * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))

    first: float
    last: float
    first, last = dimension_with(rope.beta_fast or 32), dimension_with(rope.beta_slow or 1)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # the ramp's width must not be zero
    ramp_D2 = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first), 0, 1)
    keep_D2 = 1 - ramp_D2
    inv_freq_D2 = 1.0 / (factor * periods_D2) * (1 - keep_D2) + 1.0 / periods_D2 * keep_D2

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        scaling = rope.attention_factor
    elif rope.mscale and rope.mscale_all_dim:
        scaling = magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    else:
        scaling = magnitude(1)
    return inv_freq_D2, scaling
