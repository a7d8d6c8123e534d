"""What a model family is: how its `config.json` differs from Llama's, and what its layers do differently.

A family is one file of `families/`. It says how fields that are missing are read, which `Traits` its layers have, and
which Hugging Face tensors have other names than Llama's. What a trait means is built in `mcore/` and named in
`names.py`: a family that needs no new trait touches no other file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Raw = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What the layers of a family do that Llama's do not. The defaults are Llama."""

    activation: str = "silu"
    """Of the gated MLP: silu or gelu_tanh."""
    norm_adds_one: bool = False
    """RMSNorm multiplies by 1 + weight (Gemma)."""
    input_norms: bool = True
    """A norm before attention and before the MLP."""
    output_norms: bool = False
    """A norm on what attention and the MLP give, before it is added to the residual stream."""
    qk_norm_whole: bool = False
    """Queries and keys are normalised over all their heads at once (OLMo 2), not head by head."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """On what attention and the MLP give, before it is added."""
    attention_scale: float | None = None
    """On q k; None: 1 / sqrt(head_dim)."""
    attention_cap: float | None = None
    """cap * tanh(score / cap) on the scores, before the mask (Gemma 2)."""
    logit_scale: float = 1.0
    logit_cap: float | None = None
    """As attention_cap, on the logits."""
    layers_without_rope: frozenset[int] = frozenset()
    """Layers, counted from 0, whose attention knows no positions (SmolLM3)."""


def llama_traits(raw: Raw, num_layers: int, where: str) -> Traits:
    """Those of Llama, whatever the file says."""
    return Traits()


def every_layer(raw: Raw, num_layers: int, where: str) -> list[bool]:
    """Where sliding_window is set it holds in every layer."""
    return [True] * num_layers


def one_rope(raw: Raw) -> tuple[Raw, Raw | None]:
    """The fields that rope.read_rope is to see, for layers with full and with sliding attention (None: the same)."""
    return raw, None


@dataclass(frozen=True, kw_only=True)
class Family:
    """The rules of one model family, where families differ. Defaults are those of transformers' config class."""

    architecture: str
    default_max_positions: int
    default_kv_heads: int | None = None  # None: as many as there are attention heads
    default_head_dim: int | None = None  # None: hidden_size // num_attention_heads
    default_rms_norm_eps: float = 1e-6
    default_rope_theta: float = 10000.0
    default_tied: bool = False
    activation_field: str = "hidden_act"
    always_qkv_bias: bool = False
    reads_attention_bias: bool = False  # attention_bias then gives q, k, v and the output projection a bias
    reads_mlp_bias: bool = False
    reads_partial_rotary: bool = False  # partial_rotary_factor: only the first dimensions of a head are rotated
    qk_norm: bool = False
    sliding_flag: str | None = None  # the field without which sliding_window is not read
    default_sliding_window: int | None = None
    sliding_layers: Callable[[Raw, int, str], list[bool]] | None = None
    """(config, layers, file) -> whether each layer slides, where layer_types does not say; None: no layer may."""
    traits: Callable[[Raw, int, str], Traits] = llama_traits
    ropes: Callable[[Raw], tuple[Raw, Raw | None]] = one_rope
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Megatron's name inside a layer -> the Hugging Face tensors of it inside a layer, where they are not Llama's.
    A tensor named more than once holds the parts one after the other."""
