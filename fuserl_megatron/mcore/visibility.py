"""Who may look at whom in packed rows, in the form that each attention back end reads.

A token sees earlier tokens of its own segment and of its segment's parent: plain packing (every segment its own parent)
and prefix sharing (a response's parent is its prompt) are the same rule. Padding sees padding only.

In a layer with a sliding window a token sees the last `window` of them, itself included, by their positions in the
sequence. A window that no position of the micro-batch reaches past is none (`within`).

The forms: a dense mask, the same in bands of queries with the keys that they see, runs of columns (`spans`),
FlexAttention's block mask, Transformer Engine's sequence lengths.
With context parallelism the queries are this rank's and the keys come in gathered order (context.py).

Core carries one tensor, `attention_mask`, from the model's call to the core attention, also through recomputation,
where another micro-batch may have been laid out meanwhile. `hand_over` gives a number that stands for a Visibility.

Shapes: B rows, S tokens per row, L = S / CP of them on this context-parallel rank.
"""

import itertools
import weakref
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fuserl_megatron.mcore.context import gathered_columns

Span = tuple[int, int | None]
"""Length of a run of one segment, and the number of its parent's run in the same row (None: sees itself alone)."""


@dataclass(eq=False)
class Visibility:
    """The rule for one micro-batch. Ids as in PackedBatch, int64 [B, S] of the whole rows, on the CPU."""

    segment_ids_BS: torch.Tensor
    parent_ids_BS: torch.Tensor
    device: torch.device = torch.device("cpu")
    cp_size: int = 1
    cp_rank: int = 0
    positions_BS: torch.Tensor | None = None
    """Of each token in its sequence, int64 on the CPU; needed where a layer has a window."""
    band: int | None = None
    """Columns of a band where attention goes band by band (attention.py sets it); None: span by span."""
    _masks: dict[Any, list[torch.Tensor]] = field(default_factory=dict, init=False)
    _block_masks: dict[int | None, Any] = field(default_factory=dict, init=False)
    _first_bands: dict[int, list[int]] = field(default_factory=dict, init=False)

    @cached_property
    def _longest(self) -> int:
        return 1 + int(self._positions.max())

    @property
    def _positions(self) -> torch.Tensor:
        assert self.positions_BS is not None, "a layer with a window asks for positions"
        return self.positions_BS

    def within(self, window: int | None) -> int | None:
        """The window itself; None where no token of these rows has so many before it."""
        return None if window is None or window >= self._longest else window

    def _on_device(self, window: int | None) -> tuple[torch.Tensor, ...]:
        """Query columns [L]; key columns [S]; segments and parents of the queries [B, L]; segments of the keys; with a
        window the positions of both."""
        keys_S = gathered_columns(self.segment_ids_BS.shape[1], self.cp_size)
        queries_L = keys_S.chunk(self.cp_size)[self.cp_rank]
        of_queries = (self.segment_ids_BS[:, queries_L], self.parent_ids_BS[:, queries_L])
        parts = [queries_L, keys_S, *of_queries, self.segment_ids_BS[:, keys_S]]
        if window is not None:
            parts += [self._positions[:, queries_L], self._positions[:, keys_S]]
        return tuple(t.to(self.device, non_blocking=True) for t in parts)

    def dense(self, window: int | None = None) -> torch.Tensor:
        """Bool [B, 1, L, S], True where the query (third dimension) sees the key (fourth)."""
        return _sees(*self._on_device(window), window=window).unsqueeze(1)

    def kept_dense(self, window: int | None) -> torch.Tensor:
        """`dense`, made once for all layers of this window; kept until `forget`."""
        if window not in self._masks:
            self._masks[window] = [self.dense(window)]
        return self._masks[window][0]

    @cached_property
    def spans(self) -> list[list[Span]]:
        """Each row from left to right."""
        rows = []
        for segments_S, parents_S in zip(self.segment_ids_BS, self.parent_ids_BS, strict=True):
            ids, lengths = (t.tolist() for t in torch.unique_consecutive(segments_S, return_counts=True))
            starts = [0, *itertools.accumulate(lengths)][:-1]
            number = {segment: i for i, segment in enumerate(ids)}
            parents = [number[parent] for parent in parents_S[starts].tolist()]
            rows.append([(n, p if p != i else None) for i, (n, p) in enumerate(zip(lengths, parents, strict=True))])
        return rows

    @property
    def seen_pairs(self) -> int:
        """Pairs of query and key that `spans` computes: triangles, and rectangles where there is a parent."""
        return sum(n * (n + 1) // 2 if p is None else n * (n + row[p][0]) for row in self.spans for n, p in row)

    def first_bands(self, size: int) -> list[int]:
        """For each band of `size` columns the first band that any of its tokens, in any row, looks at."""
        if size in self._first_bands:  # every layer asks
            return self._first_bands[size]
        first = self._first_bands[size] = list(range(-(-self.segment_ids_BS.shape[1] // size)))
        for row in self.spans:
            starts = [0, *itertools.accumulate(length for length, _ in row)]
            for i, (length, parent) in enumerate(row):
                seen = starts[i if parent is None else parent] // size
                for band in range(starts[i] // size, (starts[i] + length - 1) // size + 1):
                    first[band] = min(first[band], seen)
        return first

    def band_pairs(self, size: int) -> int:
        """Pairs of query and key that bands of `size` columns compute."""
        rows, length = self.segment_ids_BS.shape
        pairs = 0
        for i, first in enumerate(self.first_bands(size)):
            end = min(length, (i + 1) * size)
            pairs += rows * (end - i * size) * (end - first * size)
        return pairs

    def band_masks(self, dtype: torch.dtype, window: int | None = None) -> list[torch.Tensor]:
        """For each band 0 where its queries see a key of theirs and -inf elsewhere, [B, 1, queries, keys].

        Kept until `forget`: torch would make each layer's and each backward pass's own from a bool mask.
        """
        if (dtype, window) not in self._masks:
            segments, parents, size = self.segment_ids_BS, self.parent_ids_BS, self.band
            assert size is not None
            columns_S, masks = torch.arange(segments.shape[1]), []
            for i, first in enumerate(self.first_bands(size)):
                q, k = slice(i * size, (i + 1) * size), slice(first * size, (i + 1) * size)
                at = () if window is None else (self._positions[:, q], self._positions[:, k])
                seen = _sees(
                    columns_S[q], columns_S[k], segments[:, q], parents[:, q], segments[:, k], *at, window=window
                )
                masks.append(torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf).unsqueeze(1))
            self._masks[dtype, window] = masks
        return self._masks[dtype, window]

    def forget(self) -> None:
        """Free the masks; a backward pass that recomputes makes them again."""
        self._masks.clear()

    def block_mask(self, window: int | None = None):
        """FlexAttention's BlockMask, made once a micro-batch and read by every layer of this window."""
        if window not in self._block_masks:
            self._block_masks[window] = self._new_block_mask(window)
        return self._block_masks[window]

    def _new_block_mask(self, window: int | None):
        from torch.nn.attention.flex_attention import create_block_mask

        queries_L, keys_S, segments_BL, parents_BL, seen_BS, *at = self._on_device(window)

        def sees(b, _h, q, k):
            own = segments_BL[b, q] == seen_BS[b, k]
            seen = (own | (parents_BL[b, q] == seen_BS[b, k])) & (keys_S[k] <= queries_L[q])
            return seen if window is None else seen & (at[0][b, q] - at[1][b, k] < window)

        rows, length = segments_BL.shape
        # compiled: the uncompiled one holds the dense mask
        compiled = self.device.type == "cuda"
        return create_block_mask(sees, rows, None, length, keys_S.numel(), device=self.device, _compile=compiled)

    @cached_property
    def sequence_ends(self) -> torch.Tensor:
        """Where each segment begins and the last ends in the rows put end to end, int32."""
        lengths = [n for row in self.spans for n, _ in row]
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return ends.to(self.device)


def _sees(
    queries_L, keys_S, segments_BL, parents_BL, seen_BS, query_positions_BL=None, key_positions_BS=None, *, window=None
) -> torch.Tensor:
    """The rule, bool [B, L, S], from columns, segment ids and, with a window, positions of queries and keys."""
    seen = (segments_BL[:, :, None] == seen_BS[:, None, :]) | (parents_BL[:, :, None] == seen_BS[:, None, :])
    seen &= keys_S <= queries_L[:, None]
    if window is not None:
        seen &= query_positions_BL[:, :, None] - key_positions_BS[:, None, :] < window
    return seen


_numbers = itertools.count()
_handed_over: "weakref.WeakValueDictionary[int, Visibility]" = weakref.WeakValueDictionary()


def hand_over(visible: Visibility) -> torch.Tensor:
    """A 0-d tensor on the CPU that stands for it, as long as the caller keeps the object."""
    number = next(_numbers)
    _handed_over[number] = visible
    return torch.tensor(number)


def received(handle: torch.Tensor) -> Visibility:
    """What `hand_over` was given."""
    return _handed_over[int(handle)]
