"""The forms of one visibility rule, and the back ends that read them, against the dense mask written plainly.

Shapes: B rows, S tokens per row, Q query heads, G key/value groups, D head dimension.
"""

import gc
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserl_megatron.mcore import attention
from fuserl_megatron.mcore.context import gathered_columns
from fuserl_megatron.mcore.visibility import Visibility, hand_over, received
from fuserl_megatron.util.errors import UserError

S = 48


def row(lengths_and_shared):
    """Segment and parent ids [S] of groups (prompt length, response lengths), padded with -1."""
    segments, parents, following = [], [], 0
    for prompt, responses in lengths_and_shared:
        parent = following
        for i, length in enumerate([prompt, *responses]):
            segments += [following] * length
            parents += [parent if i else following] * length
            following += 1
    fill = [-1] * (S - len(segments[:S]))
    return segments[:S] + fill, parents[:S] + fill


groups = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), max_size=3)), max_size=5)
rows = st.lists(groups.map(row), min_size=1, max_size=2)


def visibility(rows, **rest):
    return Visibility(*(torch.tensor(ids) for ids in zip(*rows, strict=True)), **rest)


def plain(rows, b, i, j):
    segments, parents = rows[b]
    return j <= i and segments[j] in (segments[i], parents[i])


def random_inputs(num_rows):
    generator = torch.Generator().manual_seed(0)
    shapes = [(S, num_rows, heads, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def run(function, inputs):
    q, k, v = (t.permute(1, 2, 0, 3) for t in inputs)
    return function(q, k, v)


@settings(max_examples=25, deadline=None)
@given(rows)
def test_dense_mask_is_the_rule_also_for_context_ranks(rows):
    for cp_size in (1, 2):
        keys = gathered_columns(S, cp_size).tolist()
        found = [visibility(rows, cp_size=cp_size, cp_rank=r).dense() for r in range(cp_size)]
        for b in range(len(rows)):
            expected = [[plain(rows, b, i, j) for j in keys] for i in keys]
            assert torch.cat(found, dim=2)[b, 0].tolist() == expected


@settings(max_examples=25, deadline=None)
@given(rows)
def test_segment_by_segment_and_band_by_band_equal_the_dense_mask(rows):
    visible, inputs = visibility(rows), random_inputs(len(rows))
    bands = {size: visibility(rows, band=size) for size in (1, 7, 16, S)}
    grads = {}
    for name, function in {
        "dense": lambda q, k, v: attention._sdpa(q, k, v, 0.3, attn_mask=visible.dense()),
        "spans": lambda q, k, v: attention._by_span(q, k, v, visible, 0.3),
        **{n: partial(attention._by_band, visible=cut, scale=0.3) for n, cut in bands.items()},
    }.items():
        out = run(function, inputs)
        factors = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        grads[name] = [out, *torch.autograd.grad((factors * out).sum(), inputs)]
    for name in ("spans", *bands):
        for actual, expected in zip(grads[name], grads["dense"], strict=True):
            assert (actual - expected).abs().max() < 1e-12, name
    seen = int(visible.dense().sum())
    assert visible.seen_pairs >= seen
    for size, cut in bands.items():
        assert seen <= cut.band_pairs(size) == sum(mask.numel() for mask in cut.band_masks(torch.float64))
        cut.forget()
        assert not cut._masks


@pytest.mark.parametrize("cp_size", [1, 2])
def test_flex_attention_uncompiled_equals_the_dense_mask(cp_size):
    """Forward only: torch has no backward of FlexAttention on the CPU."""
    rows = [row([(9, [4, 5]), (3, []), (6, [7, 1, 2])]), row([(20, [6, 6])])]
    query, key, value = (t.detach().float() for t in random_inputs(2))
    for cp_rank in range(cp_size):
        visible = visibility(rows, cp_size=cp_size, cp_rank=cp_rank)
        mine = query.chunk(cp_size)[cp_rank]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (mine, key, value))
        expected = attention._sdpa(q, k, v, 0.3, attn_mask=visible.dense())
        actual = attention._flex(q, k, v, visible, 0.3)
        assert (actual - expected).abs().max() < 1e-5
        assert visible.block_mask() is visible.block_mask()


def test_transformer_engine_is_told_where_segments_end():
    ends = visibility([row([(9, []), (4, [])]), row([(S, [])])]).sequence_ends
    assert ends.tolist() == [0, 9, 13, S, 2 * S] and ends.dtype == torch.int32


def test_the_cheaper_form_is_taken():
    def band(segment_length, rows, length, width):
        """The cut of rows of equal segments, none of which sees another."""
        visible = Visibility(*((torch.arange(length) // segment_length).expand(rows, length),) * 2)
        assert attention.attention_argument(visible, "sdpa", width).dim() == 0
        return visible.band

    assert band(512, 1, 4096, 4096) is None  # few long segments
    assert band(40, 4, 256, 96) in (32, 64)  # many short ones
    assert band(10, 1, 64, 8) == 64  # nothing to gain: one product
    split = Visibility(*(torch.arange(4096)[None] // 512,) * 2, cp_size=2)
    assert attention.attention_argument(split, "sdpa", 4096).shape == (1, 1, 2048, 4096)


def test_what_was_handed_over_lives_as_long_as_the_caller_keeps_it():
    visible = visibility([row([])])
    handle = hand_over(visible)
    assert received(handle.detach().clone()) is visible
    del visible
    gc.collect()
    with pytest.raises(KeyError):
        received(handle)


@pytest.mark.parametrize("name", ["flex", "te"])
def test_a_back_end_that_is_not_here_is_refused(name):
    with pytest.raises(UserError, match=f"model.attention_backend={name} needs .* on the CPU; sdpa would work"):
        attention.choose_backend(name, torch.device("cpu"), have_te=True)
    assert attention.choose_backend("auto", torch.device("cpu"), have_te=True) == "sdpa"
    assert attention.choose_backend("auto", torch.device("cuda"), have_te=True) == "flex"
