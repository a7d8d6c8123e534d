"""What a Hugging Face `config.json` says about a model, read once into a frozen `ModelShape`.

The families differ from one another by a handful of rules, each family a file of `families/`. A field missing from the
file takes the default that transformers' config class of that family has; a field whose value our Megatron model cannot
represent is refused by name. The raw dictionary travels along unchanged, so that an export writes every field back,
known to us or not.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fuserl_megatron.convert.families import FAMILIES
from fuserl_megatron.convert.family import Family, Traits, every_layer
from fuserl_megatron.convert.fields import flag, layer_list, number, positive_int
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
    dtype: torch.dtype | None
    traits: Traits = Traits()
    rotary_dim: int
    """The first dimensions of a head, which are rotated; head_dim but for a few models."""
    local_rope: RopeParameters | None = None
    """Of the layers that slide, where it is another one."""
    sliding_layers: frozenset[int] = frozenset()
    """Layers, counted from 0, whose attention slides."""
    sliding_window: int | None = None
    """Tokens, itself included, that a token sees in those layers; None where no sequence can reach past it."""
    raw: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups

    def window_of(self, layer: int) -> int | None:
        """Tokens, itself included, that a token sees in this layer, counted from 0; None: all before it."""
        return self.sliding_window if layer in self.sliding_layers else None


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "pretraining_tp": ((1,), "set it to 1; it only changes the order of summation in old transformers"),
    "quantization_config": ((), "convert the model to bfloat16 or float32 weights first"),
    "auto_map": ((), "remote code is never run"),
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"),
        ((0,), "training runs without dropout; set it to 0"),
    ),
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
    traits = family.traits(raw, num_layers, where)
    _check_activation(raw, family, traits, where)
    attention_bias = family.reads_attention_bias and flag(raw, "attention_bias", where)
    rotary_dim = _rotary_dim(raw, family, head_dim, where)
    sliding_layers, window = _sliding(raw, family, num_layers, max_positions, where)
    rope_fields, local_fields = family.ropes({"rope_theta": family.default_rope_theta, **raw})
    rope = read_rope(rope_fields, max_positions, rotary_dim, where)
    return ModelShape(
        family=name,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=positive_int(raw, "intermediate_size", where),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=positive_int(raw, "vocab_size", where),
        tie_word_embeddings=flag({"tie_word_embeddings": family.default_tied, **raw}, "tie_word_embeddings", where),
        rms_norm_eps=number(raw.get("rms_norm_eps", family.default_rms_norm_eps), "rms_norm_eps", where),
        qkv_bias=family.always_qkv_bias or attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=family.reads_mlp_bias and flag(raw, "mlp_bias", where),
        qk_norm=family.qk_norm,
        rope=rope,
        max_position_embeddings=rope.max_tokens,
        dtype=_read_dtype(raw, where),
        traits=traits,
        rotary_dim=rotary_dim,
        local_rope=None if local_fields is None else read_rope(local_fields, max_positions, rotary_dim, where),
        sliding_layers=sliding_layers,
        sliding_window=window,
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


def _check_activation(raw: dict[str, Any], family: Family, traits: Traits, where: str) -> None:
    for key in {"hidden_act", family.activation_field}:
        said = raw.get(key)
        if said is not None and (not isinstance(said, str) or ACTIVATIONS.get(said) != traits.activation):
            # Gemma's first configs say hidden_act=gelu beside the hidden_activation that is read
            if key != family.activation_field and raw.get(family.activation_field) is not None:
                continue
            meant = next(name for name, ours in ACTIVATIONS.items() if ours == traits.activation)
            raise UserError(f"{where}: {key} = {said!r} is not supported: only {meant} is for a {family.architecture}")


def _sliding(
    raw: dict[str, Any], family: Family, num_layers: int, max_positions: int, where: str
) -> tuple[frozenset[int], int | None]:
    """The layers whose attention slides, and their window, None where no sequence of the model can reach past it."""
    may = family.sliding_layers is not None and (family.sliding_flag is None or flag(raw, family.sliding_flag, where))
    window = raw.get("sliding_window", family.default_sliding_window) if may else None
    listed = window is not None and family.sliding_layers is not every_layer
    kinds = ("full_attention", "sliding_attention") if listed else ("full_attention",)
    layer_types = layer_list(raw, "layer_types", num_layers, kinds, where)
    if window is None or family.sliding_layers is None:
        return frozenset(), None
    if layer_types is not None and listed:
        slides = [kind == "sliding_attention" for kind in layer_types]
    else:
        slides = family.sliding_layers(raw, num_layers, where)
    layers = frozenset(layer for layer, slide in enumerate(slides) if slide)
    window = positive_int({"sliding_window": window}, "sliding_window", where)
    return layers, window if layers and window < max_positions else None


def _rotary_dim(raw: dict[str, Any], family: Family, head_dim: int, where: str) -> int:
    """The first dimensions of a head, which are rotated."""
    given = [raw, *(raw[key] for key in ("rope_parameters", "rope_scaling") if isinstance(raw.get(key), dict))]
    said = [fields["partial_rotary_factor"] for fields in given if fields.get("partial_rotary_factor") is not None]
    shares = {float(number(value, "partial_rotary_factor", where)) for value in said} or {1.0}
    if shares == {1.0}:
        return head_dim
    share = max(shares)
    rotated = int(head_dim * share) if share <= 1 else 0
    if not family.reads_partial_rotary or len(shares) > 1 or rotated % 2 or not 0 < rotated <= head_dim:
        why = "it must give an even number of dimensions" if family.reads_partial_rotary else "only 1.0 is"
        raise UserError(f"{where}: partial_rotary_factor = {share:g} is not supported: {why}")
    return rotated


def _read_dtype(raw: dict[str, Any], where: str) -> torch.dtype | None:
    text = raw.get("dtype", raw.get("torch_dtype"))
    if text is None:
        return None
    if text not in list(DTYPES):
        raise UserError(f"{where}: dtype = {text!r} is not supported; use one of {', '.join(DTYPES)}")
    return DTYPES[text]
