"""What is ours in a transformer layer of core's, each in a public slot of its spec: norms, the residual addition, and
what the family's traits ask for layer by layer (RoPE, window, caps, scales).

RMSNorm: core's local one refuses sequence parallelism.

Shapes: S tokens, B rows, h heads of this rank, D head dimension, H hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from fuserl_megatron.convert.hf_config import ModelShape
from fuserl_megatron.convert.rope import rope_inverse_frequencies
from fuserl_megatron.mcore.attention import SegmentAttention
from fuserl_megatron.mcore.rope import PositionRotary, take_own


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh formula."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu_tanh": gelu_tanh}


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, fp32 inside, as transformers' LlamaRMSNorm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_kwargs):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # core sums the gradients of so marked parameters over TP; without the mark they are silently wrong
        mark: Any = self.weight
        mark.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype)


class RMSNormAddsOne(RMSNorm):
    """The same with 1 + weight for weight, multiplied before rounding, as transformers' Gemma3RMSNorm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        wide = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, (x.shape[-1],), 1 + self.weight.to(wide.dtype), self.eps).to(x.dtype)


class _WholeRMSNorm(torch.nn.Module):
    """RMSNorm over all heads at once, of which each tensor-parallel rank holds some; transformers' Olmo2RMSNorm."""

    heads: str
    """Core's name of their number."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_kwargs):
        super().__init__()
        heads = getattr(config, self.heads)
        self.eps, self.length = eps, heads * hidden_size
        local = heads // config.tensor_model_parallel_size
        # not called `weight`: that name in a q_layernorm is a norm of each head, which every rank holds whole
        self.heads_weight = torch.nn.Parameter(torch.ones(local * hidden_size, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[S, B, h, D] -> the same."""
        wide = x if x.dtype == torch.float64 else x.float()
        squares = wide.square().sum((-2, -1), keepdim=True)
        # summed over the ranks forward, and so is the gradient: every rank's numbers are divided by the sum
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        normed = wide * torch.rsqrt(squares / self.length + self.eps)
        return (self.heads_weight.view(x.shape[-2:]) * normed).to(x.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Core's: the weight is cut along its only dimension."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"heads_weight": 0}, sharded_offsets)


class WholeQueryNorm(_WholeRMSNorm):
    """Over all query heads."""

    heads = "num_attention_heads"


class WholeKeyNorm(_WholeRMSNorm):
    """Over all key heads."""

    heads = "num_query_groups"


class Residual(torch.nn.Module):
    """residual + scale * norm(output), in core's slot for bias, dropout and addition; there is no dropout."""

    def __init__(self, config: TransformerConfig, scale: float, norm: type[RMSNorm] | None):
        super().__init__()
        self.scale = scale
        self.norm = norm(config, config.hidden_size, eps=config.layernorm_epsilon) if norm else None

    def forward(self, _training: bool, _fused: bool) -> Callable:
        """The function that core calls with (output, bias), residual and the dropout's probability."""
        return self._add

    def _add(self, output_and_bias, residual: torch.Tensor, _probability: float) -> torch.Tensor:
        output, bias = output_and_bias
        if bias is not None:
            output = output + bias
        if self.norm is not None:
            output = self.norm(output)
        return residual + (output if self.scale == 1 else output * self.scale)


def norm_of(shape: ModelShape) -> type[RMSNorm]:
    """The norm of a family's layers and of its end."""
    return RMSNormAddsOne if shape.traits.norm_adds_one else RMSNorm


def why_not_transformer_engine(shape: ModelShape) -> str | None:
    """What this model's layers have that Transformer Engine's fused norms cannot be; None: nothing."""
    if not shape.traits.input_norms:
        return "it has no norm before attention and MLP"
    return "its norms multiply by 1 + weight" if shape.traits.norm_adds_one else None


def layer_spec(shape: ModelShape, config: TransformerConfig, use_te: bool) -> ModuleSpec:
    """Core's spec of one layer with our parts in it."""
    traits, norm = shape.traits, norm_of(shape)
    if use_te:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm)
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_norm)
        spec.submodules.input_layernorm = norm if traits.input_norms else IdentityOp
        spec.submodules.pre_mlp_layernorm = norm if traits.input_norms else IdentityOp
    attention = spec.submodules.self_attention.submodules
    if shape.qk_norm and not use_te:
        attention.q_layernorm = attention.k_layernorm = norm
    if traits.qk_norm_whole:
        attention.q_layernorm, attention.k_layernorm = WholeQueryNorm, WholeKeyNorm
    attention.core_attention = SegmentAttention
    if traits.output_norms or traits.residual_scale != 1:
        params = {"config": config, "scale": traits.residual_scale, "norm": norm if traits.output_norms else None}
        spec.submodules.self_attn_bda = ModuleSpec(module=Residual, params=params)
        spec.submodules.mlp_bda = ModuleSpec(module=Residual, params=params)
    return spec


def apply_traits(chunk: GPTModel, shape: ModelShape, backend: str) -> None:
    """Give a built chunk its positions, and each of its layers what is its own: RoPE, window, cap, scale."""
    traits = shape.traits
    found = [rope_inverse_frequencies(r, shape.rotary_dim) for r in (shape.rope, shape.local_rope) if r is not None]
    chunk.rotary_pos_emb = PositionRotary(*(inv_freq for inv_freq, _ in found))
    alike = len(found) == 1 and not traits.layers_without_rope
    for layer in chunk.decoder.layers:
        number = layer.layer_number - 1
        kind: int | None = len(found) - 1 if number in shape.sliding_layers else 0
        if number in traits.layers_without_rope:
            kind = None
        if not alike:
            take_own(layer.self_attention, kind)
        attention = layer.self_attention.core_attention
        if traits.attention_scale is not None:
            attention.scale = traits.attention_scale
        if kind is not None and shape.rotary_dim == shape.head_dim:
            attention.scale *= found[kind][1] ** 2
        elif kind is not None and found[kind][1] != 1:
            attention.rotated = (shape.rotary_dim, found[kind][1] ** 2)
        attention.window, attention.cap, attention.backend = shape.window_of(number), traits.attention_cap, backend
    if chunk.pre_process and traits.embedding_scale != 1:
        chunk.embedding.register_forward_hook(_scaled(traits.embedding_scale))


def _scaled(scale: float) -> Callable:
    def times(_module, _args, out: torch.Tensor) -> torch.Tensor:
        # rounded to the format of the weights first, as transformers does
        return out * float(torch.tensor(scale, dtype=out.dtype))

    return times
