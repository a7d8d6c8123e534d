"""What a Hugging Face `config.json` says about a model, read once into a frozen `ModelShape`.

The families (Llama, Mistral, Qwen2, Qwen3) differ from one another by a handful of rules, written as one small table
(`FAMILIES`). A field missing from the file takes the default that transformers' config class of that family has; a
field whose value our Megatron model cannot represent is refused by name. The raw dictionary travels along unchanged,
so that an export writes every field back, known to us or not.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fuserl_megatron.convert.fields import flag, number, positive_int
from fuserl_megatron.convert.rope import RopeParameters, read_rope
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import read_json
from fuserl_megatron.util.paths import export_of_run

MAX_HEAD_DIM = 2**16
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything conversion and model building need to know about one model. Sizes are counts of elements."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    rms_norm_eps: float
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeParameters
    max_position_embeddings: int
    sliding_window: int | None
    """Tokens, itself included, that a token of the model's own attention sees in some layer; None: all. The Megatron
    model's attention is full: the same for sequences of up to so many tokens, and none longer may be computed."""
    dtype: torch.dtype | None
    raw: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups


@dataclass(frozen=True, kw_only=True)
class Family:
    """The rules of one model family, where families differ. Defaults are those of transformers' config class."""

    architecture: str
    default_max_positions: int
    default_kv_heads: int | None = None  # None: as many as there are attention heads
    default_head_dim: int | None = None  # None: hidden_size // num_attention_heads
    always_qkv_bias: bool = False
    reads_attention_bias: bool = False  # attention_bias then gives q, k, v and the output projection a bias
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    sliding: str = "none"  # "always": sliding_window alone switches it on; "flag": use_sliding_window does
    default_sliding_window: int | None = None


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM", default_max_positions=2048, reads_attention_bias=True, reads_mlp_bias=True
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        default_max_positions=131072,
        default_kv_heads=8,
        sliding="always",
        default_sliding_window=4096,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        default_max_positions=32768,
        default_kv_heads=32,
        always_qkv_bias=True,
        sliding="flag",
        default_sliding_window=4096,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        default_max_positions=32768,
        default_kv_heads=32,
        default_head_dim=128,
        reads_attention_bias=True,
        qk_norm=True,
        sliding="flag",
        default_sliding_window=4096,
    ),
}

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "only silu (SwiGLU) is"),
    "pretraining_tp": ((1,), "set it to 1; it only changes the order of summation in old transformers"),
    "quantization_config": ((), "convert the model to bfloat16 or float32 weights first"),
    "auto_map": ((), "remote code is never run"),
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"),
        ((0,), "training runs without dropout; set it to 0"),
    ),
    "partial_rotary_factor": ((1,), "every dimension of a head is rotated; only 1.0 is"),
    "rope_interleaved": ((False,), "only the rotate-half layout is"),
    "per_layer_config": (({},), "all layers must have one shape"),
}
"""Fields that the Megatron model does not honour: the values accepted beside null, and why no other is."""


def read_config(source: str | Path | dict[str, Any]) -> ModelShape:
    """Read a Hugging Face config into a `ModelShape`.

    Args:
        source: a model directory, the path of a `config.json`, or the dictionary itself.

    Returns:
        The shape, with `raw` holding the dictionary exactly as it was read.

    Raises:
        UserError: one line naming the field, when the file is missing or not JSON, when the architecture is unknown, or
            when a value asks for something that cannot be represented.
    """
    if isinstance(source, dict):
        return _shape_from(dict(source), "config")
    path = Path(source)
    if path.is_dir():
        if exported := export_of_run(path):
            raise UserError(f"{path}: holds no config.json{exported}")
        path = path / "config.json"
    return _shape_from(
        read_json(path, "readable as JSON", "give a model directory, or fetch its config.json again"), str(path)
    )


def _shape_from(raw: dict[str, Any], where: str) -> ModelShape:
    name, family = _family_of(raw, where)
    heads = positive_int(raw, "num_attention_heads", where)
    hidden = positive_int(raw, "hidden_size", where)
    num_layers = positive_int(raw, "num_hidden_layers", where)
    max_positions = positive_int(raw, "max_position_embeddings", where, family.default_max_positions)
    groups = raw.get("num_key_value_heads", family.default_kv_heads)
    groups = positive_int({"num_key_value_heads": heads if groups is None else groups}, "num_key_value_heads", where)
    head_dim = raw.get("head_dim")
    if head_dim is None:
        head_dim = family.default_head_dim or hidden // heads
    head_dim = positive_int({"head_dim": head_dim}, "head_dim", where)
    if head_dim > MAX_HEAD_DIM:
        raise UserError(f"{where}: head_dim = {head_dim} is more than any model has; correct config.json")
    if heads % groups:
        raise UserError(
            f"{where}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}; "
            "correct config.json"
        )
    if head_dim % 2:
        raise UserError(f"{where}: head_dim = {head_dim} is odd; rotary embeddings need an even head_dim")
    _refuse_unrepresentable(raw, family, where)
    attention_bias = family.reads_attention_bias and flag(raw, "attention_bias", where)
    return ModelShape(
        family=name,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=positive_int(raw, "intermediate_size", where),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=positive_int(raw, "vocab_size", where),
        tie_word_embeddings=flag(raw, "tie_word_embeddings", where),
        rms_norm_eps=number(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
        qkv_bias=family.always_qkv_bias or attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=family.reads_mlp_bias and flag(raw, "mlp_bias", where),
        qk_norm=family.qk_norm,
        rope=read_rope(raw, max_positions, head_dim, where),
        max_position_embeddings=max_positions,
        sliding_window=_sliding_window(raw, family, num_layers, max_positions, where),
        dtype=_read_dtype(raw, where),
        raw=raw,
    )


def _family_of(raw: dict[str, Any], where: str) -> tuple[str, Family]:
    model_type = raw.get("model_type")
    if model_type not in list(FAMILIES):  # what the file says need not be hashable
        raise UserError(f"{where}: model_type = {model_type!r} is not supported; use one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    architectures = raw.get("architectures")
    if architectures and architectures != [family.architecture]:
        known = ", ".join(family.architecture for family in FAMILIES.values())
        raise UserError(f"{where}: architectures = {architectures!r} is not supported; use one of {known}")
    return model_type, family


def _refuse_unrepresentable(raw: dict[str, Any], family: Family, where: str) -> None:
    """Refuse, by field name, every setting that the Megatron model built from this config would not honour."""

    def refuse(key: str, why: str) -> None:
        raise UserError(f"{where}: {key} = {raw[key]!r} is not supported: {why}")

    for key, (accepted, why) in REFUSED.items():
        if raw.get(key) is not None and raw[key] not in accepted:
            refuse(key, why)
    for key, is_read in (("attention_bias", family.reads_attention_bias), ("mlp_bias", family.reads_mlp_bias)):
        if raw.get(key) and not is_read:
            refuse(key, f"{family.architecture} does not read it; remove it from config.json")


def _sliding_window(raw: dict[str, Any], family: Family, num_layers: int, max_positions: int, where: str) -> int | None:
    """The window that some layer's attention has, None where no sequence of the model can reach past it."""
    slides = family.sliding == "always" or (family.sliding == "flag" and flag(raw, "use_sliding_window", where))
    window = raw.get("sliding_window", family.default_sliding_window) if slides else None
    layers = raw.get("layer_types") or []
    known = (
        {"full_attention", "sliding_attention"}
        if window is not None and family.sliding == "flag"
        else {"full_attention"}
    )
    if not isinstance(layers, list) or any(kind not in list(known) for kind in layers):
        raise UserError(
            f"{where}: layer_types = {layers!r} is not supported: full_attention in every layer is, and "
            "sliding_attention where use_sliding_window and sliding_window say so"
        )
    if window is None:
        return None
    if family.sliding == "flag":  # which layers slide: layer_types says it, otherwise those from max_window_layers on
        first = 0 if layers else raw.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise UserError(f"{where}: max_window_layers = {first!r} must be an integer")
        if first >= num_layers or (layers and "sliding_attention" not in layers):
            return None
    window = positive_int({"sliding_window": window}, "sliding_window", where)
    return window if window < max_positions else None


def _read_dtype(raw: dict[str, Any], where: str) -> torch.dtype | None:
    text = raw.get("dtype", raw.get("torch_dtype"))
    if text is None:
        return None
    if text not in list(DTYPES):
        raise UserError(f"{where}: dtype = {text!r} is not supported; use one of {', '.join(DTYPES)}")
    return DTYPES[text]
