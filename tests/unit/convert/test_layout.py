"""Layouts: exact inverses over random shapes, and against a slow obvious twin written with loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_parallel import shard

from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.convert.layout import (
    hf_cuts,
    hf_tensors_from_megatron,
    merge_qkv,
    padded_vocab_size,
    row_runs,
    split_qkv,
    unshard,
)
from fuserl_megatron.convert.names import find_rule, hf_names, hf_shapes, lengths, local_name, megatron_names, te_name

QKV, FC1 = "decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.0.mlp.linear_fc1.weight"


@st.composite
def shapes(draw):
    """Random models whose heads, groups and widths divide by a random tensor-parallel size."""
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    groups = tp * draw(st.integers(1, 3))
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    config = {
        "model_type": family,
        "hidden_size": draw(st.integers(1, 9)),
        "intermediate_size": tp * draw(st.integers(1, 5)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": groups * draw(st.integers(1, 4)),
        "num_key_value_heads": groups,
        "head_dim": 2 * draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(1, 40)),
        "tie_word_embeddings": draw(st.booleans()),
        "sliding_window": None,
    }
    if family in ("llama", "qwen3"):
        config["attention_bias"] = draw(st.booleans())
    if family == "llama":
        config["mlp_bias"] = draw(st.booleans())
    return read_config(config), tp


def numbered(*size):
    """Distinct values, so that any misplaced row shows."""
    return torch.arange(torch.Size(size).numel(), dtype=torch.float64).reshape(size)


def qkv_parts(shape, bias):
    rest = () if bias else (shape.hidden_size,)
    q = numbered(shape.num_attention_heads * shape.head_dim, *rest)
    k = numbered(shape.num_query_groups * shape.head_dim, *rest) + 1e6
    return q, k, k + 1e6


@settings(max_examples=60, deadline=None)
@given(shapes(), st.booleans())
def test_merged_qkv_has_each_head_where_megatron_looks_for_it(drawn, bias):
    shape, _ = drawn
    q, k, v = qkv_parts(shape, bias)
    merged, D, per = merge_qkv(q, k, v, shape), shape.head_dim, shape.heads_per_group
    expected = []
    for group in range(shape.num_query_groups):
        expected += [q[head * D : (head + 1) * D] for head in range(group * per, (group + 1) * per)]
        expected += [k[group * D : (group + 1) * D], v[group * D : (group + 1) * D]]
    assert torch.equal(merged, torch.cat(expected))
    for actual, original in zip(split_qkv(merged, shape), (q, k, v), strict=True):
        assert torch.equal(actual, original)


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_every_parameter_shards_unshards_and_returns_exactly(drawn):
    shape, tp = drawn
    seen = {}
    for position, name in enumerate(megatron_names(shape)):
        row, _ = find_rule(name)
        parts = [numbered(*size) + 1e6 * position for size in row_sizes(row, shape)]
        full = full_from(row, parts, shape, tp)
        shards = [shard(full, name, tp, rank) for rank in range(tp)]
        assert len({part.shape for part in shards}) == 1
        assert torch.equal(unshard(shards, name), full)
        if row.rule != "plain":
            assert sum(part.numel() for part in shards) == full.numel()
        if row.rule == "qkv":  # a rank's rows are whole groups: it can be split without knowing of the others
            for rank, part in enumerate(shards):
                for mine, whole in zip(split_qkv(part, shape), parts, strict=True):
                    assert torch.equal(mine, whole.chunk(tp)[rank])
        for rank, part in enumerate(shards if row.rule != "vocab" else ()):
            cuts = hf_cuts(name, shape, tp, rank)
            mine = [
                whole.narrow(dim, start, stop - start) for whole, (_, dim, start, stop) in zip(parts, cuts, strict=True)
            ]
            assert torch.equal(full_from(row, mine, shape, tp), part)
        for (hf, tensor), original in zip(hf_tensors_from_megatron(name, full, shape), parts, strict=True):
            assert torch.equal(tensor, original), hf
            assert hf not in seen
            seen[hf] = True
    assert list(seen) == list(hf_shapes(shape))


def row_sizes(row, shape):
    length = lengths(shape)
    return [[length[letter] for letter in letters] for letters in row.sizes]


def full_from(row, parts, shape, tp):
    if row.rule == "qkv":
        return merge_qkv(*parts, shape)
    if row.rule == "gate_up":
        return torch.cat(parts)
    if row.rule == "vocab":
        missing = padded_vocab_size(shape.vocab_size, tp, 8) - shape.vocab_size
        return torch.nn.functional.pad(parts[0], (0, 0, 0, missing))
    return parts[0]


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_row_runs_are_the_same_layout_as_the_merge_functions(drawn):
    shape, _ = drawn
    for name in megatron_names(shape):
        row, layer = find_rule(name)
        parts = [numbered(*size) + 1e6 * i for i, size in enumerate(row_sizes(row, shape))]
        full = full_from(row, parts, shape, 1)
        held = {hf.format(i=layer): part for hf, part in zip(row.hf, parts, strict=True)}
        runs = row_runs(name, shape)
        copied = torch.cat([held[hf][start : start + count] for hf, start, _, count in runs])
        assert torch.equal(copied, full[: len(copied)]) and not full[len(copied) :].any()  # the rest is padding
        assert [at for *_, at, _ in runs] == [sum(run[3] for run in runs[:i]) for i in range(len(runs))]
        assert sum(count for *_, count in runs) == sum(len(part) for part in parts)


def test_interleaving_and_gate_up_are_not_the_identity():
    # The negative control: plain concatenation, or a contiguous cut of fc1, is something else.
    shape = read_config(
        dict(model_type="llama", hidden_size=4, intermediate_size=8, num_hidden_layers=1, vocab_size=5)
        | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
    )
    q, k, v = qkv_parts(shape, bias=False)
    assert not torch.equal(merge_qkv(q, k, v, shape), torch.cat((q, k, v)))
    full = torch.cat((numbered(8, 4), numbered(8, 4) + 1e6))
    assert not torch.equal(shard(full, FC1, 2, 0), full.chunk(2)[0])
    gate, up = shard(full, FC1, 2, 1).chunk(2)
    assert torch.equal(gate, numbered(8, 4)[4:]) and torch.equal(up, numbered(8, 4)[4:] + 1e6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300_000), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 64, 128]))
def test_padded_vocabulary_is_the_smallest_multiple(vocab, tp, divisible_by):
    padded = padded_vocab_size(vocab, tp, divisible_by)
    assert padded >= vocab > padded - divisible_by * tp and padded % (divisible_by * tp) == 0


def test_padded_rows_are_never_exported(make_config):
    shape = read_config(make_config(vocab_size=5))
    weight = torch.ones(5, 48)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 3), value=7.0)  # what an optimiser could have done to them
    ((name, exported),) = hf_tensors_from_megatron("output_layer.weight", padded, shape)
    assert name == "lm_head.weight" and torch.equal(exported, weight)


def test_tied_output_layer_is_read_from_the_embedding_and_not_written(make_config):
    shape = read_config(make_config(tie_word_embeddings=True))
    assert hf_names("output_layer.weight", shape) == ("model.embed_tokens.weight",)
    assert hf_tensors_from_megatron("output_layer.weight", torch.ones(53, 48), shape) == []
    assert "lm_head.weight" not in hf_shapes(shape)
    assert "output_layer.weight" not in megatron_names(shape)


@pytest.mark.parametrize(
    ("local", "fused"),
    [
        ("decoder.layers.11.input_layernorm.weight", "decoder.layers.11.self_attention.linear_qkv.layer_norm_weight"),
        ("decoder.layers.0.pre_mlp_layernorm.weight", "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        (QKV, QKV),
    ],
)
def test_transformer_engine_names(local, fused):
    assert te_name(local) == fused and local_name(fused) == local
    assert local_name(local) == local and find_rule(fused) == find_rule(local)


def test_names_are_those_of_stock_gpt_model(make_config):
    names = megatron_names(read_config(make_config("qwen3", num_hidden_layers=1)))
    layer = "decoder.layers.0."
    assert names == [
        "embedding.word_embeddings.weight",
        layer + "input_layernorm.weight",
        layer + "self_attention.linear_qkv.weight",
        layer + "self_attention.q_layernorm.weight",
        layer + "self_attention.k_layernorm.weight",
        layer + "self_attention.linear_proj.weight",
        layer + "pre_mlp_layernorm.weight",
        layer + "mlp.linear_fc1.weight",
        layer + "mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("decoder.layers.0.mlp.router.weight", "not a parameter"),
        ("decoder.layers.0.self_attention.linear_qkv.bias", "qkv_bias"),
        ("decoder.layers.2.input_layernorm.weight", "2 layers"),
    ],
)
def test_unknown_parameters_are_named(make_config, name, said):
    with pytest.raises(ValueError, match=said):
        hf_names(name, read_config(make_config()))


def test_a_parameter_that_does_not_divide_over_the_ranks_is_named(make_config):
    with pytest.raises(ValueError, match="linear_fc2.weight: 6 does not divide over 4"):
        hf_cuts("decoder.layers.0.mlp.linear_fc2.weight", read_config(make_config(intermediate_size=6)), 4, 0)
    with pytest.raises(ValueError, match=r"linear_proj.weight \(key/value heads\): 4 does not divide over 8"):
        hf_cuts("decoder.layers.0.self_attention.linear_proj.weight", read_config(make_config()), 8, 0)
