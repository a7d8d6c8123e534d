"""Number formats: what trainer.precision means for tensors, for core's configuration and for Transformer Engine.

FP8 is a format of matrix products: weights and activations are bf16 (or, with model.fp8_params, the weights fp8) and
are scaled into 8 bits before each product. The recipes differ in where the scales come from:

    fp8_delayed     largest values seen in earlier steps (a history for each tensor, the "amax state")
    fp8_current     the tensor's own largest value, each time
    fp8_blockwise   the same for blocks of 128 (activations) and 128 x 128 (weights)
    fp8_mxfp8       blocks of 32, in hardware that Blackwell has and Hopper has not
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.transformer.transformer_config import TransformerConfig

from fuserl_megatron.util.errors import UserError

RECIPES = {"fp8_delayed": "delayed", "fp8_current": "tensorwise", "fp8_blockwise": "blockwise", "fp8_mxfp8": "mxfp8"}
"""trainer.precision -> core's fp8_recipe."""
NEEDED = {"fp8_delayed": (8, 9), "fp8_current": (8, 9), "fp8_blockwise": (9, 0), "fp8_mxfp8": (10, 0)}
"""Compute capability from which Transformer Engine has the recipe."""


def parameter_dtype(precision: str) -> torch.dtype:
    """Weights and activations outside of fp8 products."""
    return torch.float32 if precision == "32" else torch.bfloat16


def fp8_fields(precision: str, fp8_params: bool) -> dict:
    """TransformerConfig's fields for a precision; none without FP8.

    Forward e4m3 and backward e5m2 where a tensor has one scale; with a scale for each block e4m3 has range enough.
    """
    recipe = RECIPES.get(precision)
    if recipe is None:
        return {}
    fields: dict[str, Any] = dict(fp8="hybrid" if recipe in ("delayed", "tensorwise") else "e4m3", fp8_recipe=recipe)
    if recipe == "delayed":
        fields |= dict(fp8_margin=0, fp8_amax_history_len=1024, fp8_amax_compute_algo="max")
    return fields | dict(fp8_param=fp8_params)


def check_fp8(precision: str, device: torch.device, use_te: bool) -> None:
    """What FP8 needs of the machine.

    Raises:
        UserError: it is not to be had here, with the reason.
    """
    if precision not in RECIPES:
        return
    if device.type != "cuda" or not use_te:
        here = "this run is on the CPU" if device.type != "cuda" else "this run has core's local layers"
        raise UserError(
            f"trainer.precision={precision}: FP8 needs Transformer Engine's layers on CUDA, and {here}; "
            "trainer.precision=bf16 would work."
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < NEEDED[precision]:
        name, works = torch.cuda.get_device_name(device), "fp8_blockwise" if capability >= (9, 0) else "bf16"
        why = "needs newer hardware"
        if precision == "fp8_mxfp8":
            why = "scales blocks of 32 in hardware, which Blackwell has and Hopper has not"
        raise UserError(
            f"trainer.precision={precision}: {why}, and this is a {name}; trainer.precision={works} would work."
        )


@contextmanager
def scoring(config: TransformerConfig) -> Iterator[None]:
    """Around passes without gradients: the amax state is neither read nor written by them.

    Delayed scaling takes its scales from earlier steps of training. A scoring pass would write its own largest values
    into the history, and a reference (or a policy before its first step) has none to read: its passes compute in bf16.
    The other recipes have no state and score in FP8, by the same products as the policy.
    """
    fp8 = config.fp8
    if config.fp8_recipe == "delayed":
        config.fp8 = None
    try:
        yield
    finally:
        config.fp8 = fp8


@torch.no_grad()
def fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Set a parameter. One kept in FP8 also remembers the unrounded value, of which the optimizer's master copy is made
    (it would otherwise be what the memory held before)."""
    amax = getattr(getattr(parameter, "_quantizer", None), "amax", None)
    if (
        amax is not None
    ):  # of uninitialised memory, which was quantized when the layer was built; copying keeps the larger
        amax.zero_()
    parameter.copy_(value)
    if hasattr(parameter, "_high_precision_init_val"):
        parameter._high_precision_init_val.copy_(value)


def plain(parameter: torch.Tensor) -> torch.Tensor:
    """Its value as an ordinary tensor."""
    value = parameter.detach()
    return value.dequantize() if is_float8tensor(value) else value
