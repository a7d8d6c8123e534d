"""Rotary frequencies, computed operation for operation as transformers does: fp32 results agree to the last bit.

Megatron-core's own rotary module knows only the `factor` of Llama 3 scaling (its three other fields are constants
there) and no linear or dynamic scaling; a model trained with wrong frequencies is silently a different model.
Everything here is a pure function of the config's fields. Legend: D dimensions of one attention head.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fuserl_megatron.convert.rope_config import RopeParameters


def rope_inverse_frequencies(rope: RopeParameters, head_dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and the factor on cos and sin, for sequences of up to max_position_embeddings tokens.

    The angle of pair d at position p is p * inv_freq[d]; cos and sin are then multiplied by the attention scaling.
    Sources of the formulas: RoPE arXiv 2104.09864; linear 2306.15595; yarn 2309.00071; dynamic and llama3 as in
    transformers, where they were first written down. `dynamic` stretches the base beyond max_position_embeddings only:
    up to there its frequencies are the unscaled ones, whatever its factor says.

    Args:
        rope: the model's RoPE fields.
        head_dim: D, even.

    Returns:
        (inv_freq [D/2] in fp32 radians per position, attention scaling without unit).
    """
    periods_D2 = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match rope.type:
        case "default" | "dynamic":
            return 1.0 / periods_D2, 1.0
        case "linear":
            return 1.0 / periods_D2 / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, 1.0 / periods_D2), 1.0
        case "yarn":
            return _yarn(rope, head_dim, periods_D2)
    raise ValueError(f"rope type {rope.type!r} is not one of default, linear, dynamic, yarn, llama3")


def _llama3(rope: RopeParameters, inv_freq_D2: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    original = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength_D2 = 2 * math.pi / inv_freq_D2
    is_long_D2 = wavelength_D2 > original / low
    is_short_D2 = wavelength_D2 < original / high
    scaled_D2 = torch.where(is_long_D2, inv_freq_D2 / rope.factor, inv_freq_D2)
    share_D2 = (original / wavelength_D2 - low) / (high - low)
    between_D2 = (1 - share_D2) * scaled_D2 / rope.factor + share_D2 * scaled_D2
    return torch.where(is_long_D2 | is_short_D2, scaled_D2, between_D2)


def _yarn(rope: RopeParameters, head_dim: int, periods_D2: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Dimensions turning often in the original context are kept, slow ones interpolated, a ramp between."""
    original = rope.original_max_position_embeddings
    factor = rope.max_position_embeddings / original if rope.factor is None else rope.factor

    def dimension_with(turns: float) -> float:
        return (head_dim * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))

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
