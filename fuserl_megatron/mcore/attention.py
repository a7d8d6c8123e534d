"""The core attention of every layer, in the layer spec's `core_attention` slot: one rule, three back ends.

    sdpa   torch's scaled_dot_product_attention: with a dense mask; on the CPU in bands of queries with the keys that
           they see, or segment by segment, whichever is less work (packed rows are mostly pairs that do not see each
           other)
    flex   torch's FlexAttention on CUDA: blocks of pairs that do not see each other are skipped
    te     Transformer Engine's packed (thd) attention on CUDA: segments without parents, so no shared prefixes, and no
           soft cap

A layer may have a sliding window (visibility.py) and a soft cap, cap * tanh(score / cap), on its scores.

Shapes: B rows, S tokens per row, L of them on this context-parallel rank (all, without), Q query heads of this rank, G
key/value groups of this rank, D head dimension.
"""

from functools import cache

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from fuserl_megatron.mcore.visibility import Visibility, hand_over, received
from fuserl_megatron.util.errors import UserError

CALL_COST = 1_000_000
"""What one more product costs on a CPU core, in multiply-adds of the score matrix (docs/parallelism.md: measured)."""


def choose_backend(wanted: str, device: torch.device, have_te: bool) -> str:
    """sdpa, flex or te for model.attention_backend.

    Raises:
        UserError: it was asked for and is not to be had here.
    """
    on_gpu = device.type == "cuda"
    have_flex = on_gpu and tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 11)
    if wanted == "auto":
        return "flex" if have_flex else "sdpa"
    if wanted == "flex" and not have_flex:
        here = f"this is torch {torch.__version__}" if on_gpu else "this run is on the CPU"
        raise UserError(f"model.attention_backend=flex needs CUDA and torch 2.11, and {here}; sdpa would work.")
    if wanted == "te" and not (on_gpu and have_te):
        here = "it is not installed" if on_gpu else "this run is on the CPU"
        raise UserError(f"model.attention_backend=te needs Transformer Engine on CUDA, and {here}; sdpa would work.")
    return wanted


def attention_argument(visible: Visibility, backend: str, width: int, alike: bool = True) -> torch.Tensor:
    """What core is to carry to the attention as `attention_mask`: a dense mask, or what stands for the object.

    Args:
        visible: the rule; the caller keeps it until the backward pass is done.
        backend: from `choose_backend`.
        width: Q x D, multiply-adds for one score.
        alike: whether one mask serves all layers.
    """
    if backend == "sdpa":
        if not _in_pieces(visible):
            return visible.dense() if alike else hand_over(visible)
        visible.band = cheapest_band(visible, width)
    return hand_over(visible)


def _in_pieces(visible: Visibility) -> bool:
    return visible.device.type == "cpu" and visible.cp_size == 1


def cheapest_band(visible: Visibility, width: int) -> int | None:
    """Columns of a band for attention band by band, all of the row for one product; None for span by span."""
    length = visible.segment_ids_BS.shape[1]
    costs: dict[int | None, int] = {None: visible.seen_pairs * width + CALL_COST * sum(map(len, visible.spans))}
    sizes = [length, *(2**n for n in range(5, length.bit_length()) if 2**n < length)]
    for size in sizes:
        costs[size] = visible.band_pairs(size) * width + CALL_COST * -(-length // size)
    return min(costs, key=costs.__getitem__)


class SegmentAttention(MegatronModule):
    """softmax(cap(q k^T * scale) + mask) v; no dropout, no state. model.py sets scale, window, cap and backend.

    The rotary attention scaling of yarn multiplies queries and keys alike: its square is part of `scale`. Where a head
    is rotated in part, it is on that part of the queries (`rotated`).
    """

    def __init__(self, config, softmax_scale=None, **_layer_number_mask_type_and_groups):
        super().__init__(config=config)
        self.scale: float = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.window: int | None = None
        """Tokens that a token sees, itself included; None: all before it."""
        self.cap: float | None = None
        self.rotated: tuple[int, float] | None = None
        """First dimensions of a head and the factor on them."""
        self.backend = "sdpa"

    def forward(self, query, key, value, attention_mask, **_kwargs):
        """Query [L, B, Q, D], key and value [L, B, G, D], mask [B, 1, L, S] or `hand_over` -> [L, B, Q*D].

        In rows under a dense mask each token's position is its column: proofs/verify_sides.py gives one, and so do
        models whose layers have no window.
        """
        if self.rotated is not None:
            dimensions, factor = self.rotated
            query = torch.cat((query[..., :dimensions] * factor, query[..., dimensions:]), dim=-1)
        if self.config.context_parallel_size > 1:
            # one collective for both; backward sums the ranks' gradients of each key and gives every rank its own
            both = gather_from_sequence_parallel_region(
                torch.cat((key, value), dim=-1).contiguous(), True, ps.get_context_parallel_group()
            )
            key, value = both.chunk(2, dim=-1)
        if self.backend == "te":
            visible = received(attention_mask)
            return _te(query, key, value, visible, self.scale, visible.within(self.window))
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if attention_mask.dim():
            out = _scores(q, k, v, self.scale, self.cap, attn_mask=_last(attention_mask, self.window))
        else:
            visible = received(attention_mask)
            window = visible.within(self.window)
            if self.backend == "flex":
                out = _flex(q, k, v, visible, self.scale, self.cap, window)
            elif not _in_pieces(visible):
                out = _scores(q, k, v, self.scale, self.cap, attn_mask=visible.kept_dense(window))
            else:
                pieces = _by_span if visible.band is None else _by_band
                out = pieces(q, k, v, visible, self.scale, self.cap, window)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def _last(mask: torch.Tensor, window: int | None) -> torch.Tensor:
    """The mask [B, 1, L, S] with the last `window` keys of each query only; the queries are the last L of S columns."""
    if window is None or window >= mask.shape[3]:
        return mask
    past = mask.shape[3] - mask.shape[2]
    return mask & ~torch.ones(mask.shape[2:], dtype=torch.bool, device=mask.device).tril(past - window)


def _scores(q, k, v, scale: float, cap: float | None, **mask):
    return _sdpa(q, k, v, scale, **mask) if cap is None else _capped(q, k, v, scale, cap, **mask)


def _sdpa(q, k, v, scale, **mask):
    shared = q.shape[1] != k.shape[1]
    if shared and q.is_cuda:
        # with a mask CUDA has only the math kernel for grouped heads (fp32 scores in memory): repeat the keys
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        shared = False
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=shared, **mask)


def _capped(q, k, v, scale: float, cap: float, attn_mask=None, is_causal: bool = False):
    """As `_sdpa`, with the cap between scores and mask. It holds the scores."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = cap * torch.tanh(q @ k.transpose(2, 3) * (scale / cap))
    if is_causal:
        attn_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    assert attn_mask is not None
    scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return wide.softmax(-1).to(v.dtype) @ v


def _by_band(q, k, v, visible: Visibility, scale: float, cap: float | None = None, window: int | None = None):
    """Each band of queries, all rows at once, against the bands from the first to the last that it sees."""
    # split, not slices: the gradient is put together once
    band = visible.band
    assert band is not None
    q_bands, k_bands, v_bands = (t.split(band, dim=2) for t in (q, k, v))
    masks, parts = visible.band_masks(q.dtype, window), []
    for i, first in enumerate(visible.first_bands(band)):
        keys, values = (torch.cat(bands[first : i + 1], dim=2) for bands in (k_bands, v_bands))
        parts.append(_scores(q_bands[i], keys, values, scale, cap, attn_mask=masks[i]))
    return torch.cat(parts, dim=2)


def _by_span(q, k, v, visible: Visibility, scale: float, cap: float | None = None, window: int | None = None):
    """Each run of a row against itself, and against its parent's run where it has one."""
    rows = []
    for b, spans in enumerate(visible.spans):
        lengths = [length for length, _ in spans]
        # split, not slices: the gradient is put together once
        q_runs, k_runs, v_runs = (t[b : b + 1].split(lengths, dim=2) for t in (q, k, v))
        parts = []
        for i, (length, parent) in enumerate(spans):
            if parent is None and (window is None or length <= window):
                parts.append(_scores(q_runs[i], k_runs[i], v_runs[i], scale, cap, is_causal=True))
                continue
            before = 0 if parent is None else lengths[parent]  # a response follows its prompt: columns are positions
            keys, values = (
                runs[i] if parent is None else torch.cat((runs[parent], runs[i]), dim=2) for runs in (k_runs, v_runs)
            )
            mask = torch.ones(length, keys.shape[2], dtype=torch.bool).tril(before)
            parts.append(_scores(q_runs[i], keys, values, scale, cap, attn_mask=_last(mask[None, None], window)))
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _soft_cap(cap: float):
    def capped(score, _b, _h, _q, _k):
        return cap * torch.tanh(score / cap)

    return capped


def _flex(q, k, v, visible: Visibility, scale: float, cap: float | None = None, window: int | None = None):
    from torch.nn.attention.flex_attention import flex_attention

    # uncompiled it is a plain twin for tests: it holds all scores
    run = _compiled_flex() if q.is_cuda else flex_attention
    score_mod = None if cap is None else _soft_cap(cap)
    blocks = visible.block_mask(window)
    return run(q, k, v, score_mod=score_mod, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@cache
def _te_attention(heads: int, groups: int, head_dim: int, scale: float, window: int | None):
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        head_dim,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        softmax_scale=scale,
        window_size=None if window is None else (window - 1, 0),
    )


def _te(query, key, value, visible: Visibility, scale: float, window: int | None = None):
    length, rows = query.shape[:2]
    ends = visible.sequence_ends
    q, k, v = (t.transpose(0, 1).reshape(rows * length, *t.shape[2:]) for t in (query, key, value))
    out = _te_attention(q.shape[1], k.shape[1], q.shape[2], scale, window)(
        q,
        k,
        v,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        # an upper bound; the longest itself would change with each micro-batch, and the back end be chosen anew
        max_seqlen_q=length,
        max_seqlen_kv=length,
    )
    return out.reshape(rows, length, -1).transpose(0, 1).contiguous()
