"""The one table of names: Hugging Face tensors <-> Megatron parameters, as data.

A row says: which Megatron parameter (stock GPTModel keys, local layer spec, global layer index), which Hugging Face
tensors make it up and in which order, by which rule they are laid out and cut by tensor parallelism, their sizes, and
which feature of the model it exists for. Everything else in this room is a function of these rows.

Legend: H hidden, F feed-forward width, V vocabulary, D head dimension, A attention heads, G key/value groups.
"""

import re
from dataclasses import dataclass
from operator import attrgetter

from fuserl_megatron.convert.families import FAMILIES
from fuserl_megatron.convert.hf_config import ModelShape


@dataclass(frozen=True)
class NameRule:
    """One row of the table.

    `rule` is plain (every tensor-parallel rank holds it whole), row (cut along dimension 1), or one of those cut along
    dimension 0 in layout.py: qkv, gate_up, heads, vocab (padded); `sizes` gives the dimensions of each Hugging Face
    tensor in the letters of the legend; `needs` names the flag of the ModelShape without which the parameter does not
    exist ("" always).
    """

    megatron: str
    hf: tuple[str, ...]
    rule: str
    sizes: tuple[tuple[str, ...], ...]
    needs: str = ""


_L, _M = "model.layers.{i}.", "decoder.layers.{i}."
_QKV = tuple(_L + f"self_attn.{x}_proj." for x in "qkv")
_FC1 = tuple(_L + f"mlp.{x}_proj." for x in ("gate", "up"))

BEFORE_LAYERS = (NameRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab", (("V", "H"),)),)
LAYER = (
    NameRule(_M + "input_layernorm.weight", (_L + "input_layernorm.weight",), "plain", (("H",),), "traits.input_norms"),
    NameRule(
        _M + "self_attention.linear_qkv.weight",
        tuple(name + "weight" for name in _QKV),
        "qkv",
        (("AD", "H"), ("GD", "H"), ("GD", "H")),
    ),
    NameRule(
        _M + "self_attention.linear_qkv.bias",
        tuple(name + "bias" for name in _QKV),
        "qkv",
        (("AD",), ("GD",), ("GD",)),
        "qkv_bias",
    ),
    NameRule(
        _M + "self_attention.q_layernorm.weight", (_L + "self_attn.q_norm.weight",), "plain", (("D",),), "qk_norm"
    ),
    NameRule(
        _M + "self_attention.k_layernorm.weight", (_L + "self_attn.k_norm.weight",), "plain", (("D",),), "qk_norm"
    ),
    NameRule(
        _M + "self_attention.q_layernorm.heads_weight",
        (_L + "self_attn.q_norm.weight",),
        "heads",
        (("AD",),),
        "traits.qk_norm_whole",
    ),
    NameRule(
        _M + "self_attention.k_layernorm.heads_weight",
        (_L + "self_attn.k_norm.weight",),
        "heads",
        (("GD",),),
        "traits.qk_norm_whole",
    ),
    NameRule(_M + "self_attention.linear_proj.weight", (_L + "self_attn.o_proj.weight",), "row", (("H", "AD"),)),
    NameRule(
        _M + "self_attention.linear_proj.bias",
        (_L + "self_attn.o_proj.bias",),
        "plain",  # added once, after the sum over ranks
        (("H",),),
        "attention_out_bias",
    ),
    NameRule(
        _M + "self_attn_bda.norm.weight",
        (_L + "post_attention_layernorm.weight",),
        "plain",
        (("H",),),
        "traits.output_norms",
    ),
    NameRule(
        _M + "pre_mlp_layernorm.weight",
        (_L + "post_attention_layernorm.weight",),
        "plain",
        (("H",),),
        "traits.input_norms",
    ),
    NameRule(
        _M + "mlp.linear_fc1.weight", tuple(name + "weight" for name in _FC1), "gate_up", (("F", "H"), ("F", "H"))
    ),
    NameRule(
        _M + "mlp.linear_fc1.bias", tuple(name + "bias" for name in _FC1), "gate_up", (("F",), ("F",)), "mlp_bias"
    ),
    NameRule(_M + "mlp.linear_fc2.weight", (_L + "mlp.down_proj.weight",), "row", (("H", "F"),)),
    NameRule(_M + "mlp.linear_fc2.bias", (_L + "mlp.down_proj.bias",), "plain", (("H",),), "mlp_bias"),
    NameRule(
        _M + "mlp_bda.norm.weight",
        (_L + "post_feedforward_layernorm.weight",),
        "plain",
        (("H",),),
        "traits.output_norms",
    ),
)
AFTER_LAYERS = (
    NameRule("decoder.final_layernorm.weight", ("model.norm.weight",), "plain", (("H",),)),
    NameRule("output_layer.weight", ("lm_head.weight",), "vocab", (("V", "H"),)),
)

# Transformer Engine fuses each norm into the linear layer that follows it; only the name of its weight changes.
TE_FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_LOCAL_FUSED = {fused: local for local, fused in TE_FUSED.items()}
_LAYER_NAME = re.compile(r"^(decoder\.layers\.)(\d+)\.(.+)$")
_BY_NAME = {row.megatron: row for row in (*BEFORE_LAYERS, *LAYER, *AFTER_LAYERS)}


def te_name(local: str) -> str:
    """The name a parameter has under the Transformer Engine spec, given its name under the local spec."""
    return _renamed(local, TE_FUSED)


def local_name(te: str) -> str:
    """The name a parameter has under the local spec, given its name under either spec."""
    return _renamed(te, _LOCAL_FUSED)


def _renamed(name: str, table: dict[str, str]) -> str:
    match = _LAYER_NAME.match(name)
    if match is None:
        return name
    prefix, index, rest = match.groups()
    return f"{prefix}{index}.{table.get(rest, rest)}"


def find_rule(megatron_name: str) -> tuple[NameRule, int | None]:
    """The row of a Megatron parameter (either spec's name, global layer index) and its layer, None outside the layers.

    Raises:
        ValueError: no row has that name.
    """
    name = local_name(megatron_name)
    match = _LAYER_NAME.match(name)
    row = _BY_NAME.get(f"decoder.layers.{{i}}.{match.group(3)}" if match else name)
    if row is None:
        raise ValueError(f"{megatron_name}: not a parameter the name table knows; see docs/conversion.md for the table")
    return row, int(match.group(2)) if match else None


def hf_names(megatron_name: str, shape: ModelShape) -> tuple[str, ...]:
    """The Hugging Face tensors that make up one Megatron parameter, in layout order.

    With tied embeddings the last pipeline stage's copy `output_layer.weight` is read from the embedding.

    Raises:
        ValueError: the parameter is unknown, or this model does not have it (a bias or norm its config lacks, or a
            layer past its end).
    """
    row, layer = find_rule(megatron_name)
    if not _exists(row, shape):
        raise ValueError(f"{megatron_name}: this {shape.family} model has none ({row.needs} is false in its config)")
    if layer is not None and layer >= shape.num_layers:
        raise ValueError(f"{megatron_name}: the model has {shape.num_layers} layers (0 to {shape.num_layers - 1})")
    if row.megatron == "output_layer.weight" and shape.tie_word_embeddings:
        return BEFORE_LAYERS[0].hf
    inside = FAMILIES[shape.family].names.get(row.megatron.removeprefix(_M)) if layer is not None else None
    named = row.hf if inside is None else tuple(_L + name for name in inside)
    return tuple(name.format(i=layer) for name in named)


def hf_parts(megatron_name: str, shape: ModelShape) -> list[tuple[str, int, int]]:
    """Where the parts of one Megatron parameter lie: (Hugging Face tensor, its first row, rows), in layout order.

    Raises:
        ValueError: as `hf_names`.
    """
    row, _ = find_rule(megatron_name)
    length, parts, used = lengths(shape), [], dict[str, int]()
    for name, letters in zip(hf_names(megatron_name, shape), row.sizes, strict=True):
        first = used.get(name, 0)
        parts.append((name, first, length[letters[0]]))
        used[name] = first + length[letters[0]]
    return parts


def megatron_names(shape: ModelShape) -> list[str]:
    """All Megatron parameters of the model under the local spec, in the order an export writes them."""
    return [name for name, _ in _rows(shape)]


def lengths(shape: ModelShape) -> dict[str, int]:
    """The letters of `NameRule.sizes` as numbers."""
    return {
        "H": shape.hidden_size,
        "F": shape.ffn_hidden_size,
        "V": shape.vocab_size,
        "D": shape.head_dim,
        "AD": shape.num_attention_heads * shape.head_dim,
        "GD": shape.num_query_groups * shape.head_dim,
    }


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model with its dimensions, in the order an export writes them."""
    length, shapes = lengths(shape), dict[str, tuple[int, ...]]()
    for name, row in _rows(shape):
        for (hf, first, rows), (_, *rest) in zip(hf_parts(name, shape), row.sizes, strict=True):
            shapes[hf] = (first + rows, *(length[letter] for letter in rest))
    return shapes


def _exists(row: NameRule, shape: ModelShape) -> bool:
    return not row.needs or bool(attrgetter(row.needs)(shape))


def _rows(shape: ModelShape) -> list[tuple[str, NameRule]]:
    layer = [row for row in LAYER if _exists(row, shape)]
    after = [row for row in AFTER_LAYERS if row.megatron != "output_layer.weight" or not shape.tie_word_embeddings]
    return [
        *((row.megatron, row) for row in BEFORE_LAYERS),
        *((row.megatron.format(i=i), row) for i in range(shape.num_layers) for row in layer),
        *((row.megatron, row) for row in after),
    ]
