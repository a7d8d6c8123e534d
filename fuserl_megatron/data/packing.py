"""Packing as plain integers: which micro-batch, row and column everything goes to. Knows nothing of tokens.

A *chunk* is a run of positions that must lie in one row; a *unit* is a list of chunks that must lie in one micro-batch
(B rows of S positions). The chunks of a group depend on prefix sharing (P prompt tokens, R_m response tokens):

    without   one chunk per response, P + R_m - 1 positions (the last response token predicts nothing)
    with      one chunk for the whole group, (P - 1) + sum_m R_m positions: the prompt without its last token once, then
              for each response a copy of that last token and the response without its own last token

With packing off every chunk has a row to itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Placement:
    """Where a unit went."""

    micro_batch: int
    rows: tuple[int, ...]
    """Row of each chunk."""
    starts: tuple[int, ...]
    """First column of each chunk."""


def group_chunks(prompt_length: int, response_lengths: Sequence[int], share_prefix: bool) -> list[int]:
    """Positions of each chunk of one group, from P and R_m: one chunk with a shared prefix, else one per response."""
    if share_prefix:
        return [prompt_length - 1 + sum(response_lengths)]
    return [prompt_length + r - 1 for r in response_lengths]


def attended_keys(prompt_length: int, response_lengths: Sequence[int] | np.ndarray, share_prefix: bool) -> int:
    """Sum over one group's positions of the keys each sees: itself and what lies before it of its own sequence.

    Without sharing a chunk of T positions sees T (T + 1) / 2; with it the prefix of p = P - 1 positions is gone through
    once, p (p + 1) / 2, and a response of R positions sees p R + R (R + 1) / 2.
    """
    prefix, lengths = prompt_length - 1, np.asarray(response_lengths, np.int64)
    own = int((lengths * (lengths + 1) // 2 + prefix * lengths).sum())
    return own + prefix * (prefix + 1) // 2 * (1 if share_prefix else len(lengths))


def pack(
    units: Sequence[Sequence[int]], seq_length: int, num_rows: int, one_chunk_per_row: bool = False
) -> list[Placement]:
    """First-fit decreasing over the micro-batches, best-fit decreasing over a micro-batch's rows.

    Units go from large to small (ties: given order) into the first micro-batch that takes them whole; there each chunk,
    from large to small, goes into the row with the least room that still holds it. A function of its arguments alone.

    Args:
        units: chunk lengths of every unit.
        seq_length: S, positions per row.
        num_rows: B, rows per micro-batch.
        one_chunk_per_row: packing off.

    Returns:
        One Placement per unit, in the order given.

    Raises:
        ValueError: a unit does not fit an empty micro-batch (ask `fits` first).
    """
    placements: list[Placement | None] = [None] * len(units)
    rooms: list[list[int]] = []  # free positions per row of each open micro-batch; columns fill from the left
    for u in sorted(range(len(units)), key=lambda u: -sum(units[u])):
        for m in range(len(rooms) + 1):
            if m == len(rooms):
                rooms.append([seq_length] * num_rows)
            placed = _place(units[u], rooms[m], seq_length, one_chunk_per_row)
            if placed is not None:
                placements[u] = Placement(m, *placed)
                break
            if m == len(rooms) - 1 and rooms[m] == [seq_length] * num_rows:
                raise ValueError(f"unit {u} with chunks {list(units[u])} does not fit {num_rows} rows of {seq_length}")
    return placements  # type: ignore[return-value]  # every unit was placed


def fits(unit: Sequence[int], seq_length: int, num_rows: int, one_chunk_per_row: bool = False) -> bool:
    """Whether `pack` can place a unit in an empty micro-batch."""
    if max(unit) > seq_length:
        return False
    if len(unit) <= num_rows:
        return True
    return _place(unit, [seq_length] * num_rows, seq_length, one_chunk_per_row) is not None


def _place(
    unit: Sequence[int], room: list[int], seq_length: int, one_chunk_per_row: bool
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Rows and starts of a unit's chunks; takes the room, or leaves it untouched and returns None."""
    if sum(unit) > sum(room):
        return None
    left = list(room)
    rows, starts = [0] * len(unit), [0] * len(unit)
    for c in sorted(range(len(unit)), key=lambda c: -unit[c]):
        able = [b for b in range(len(left)) if left[b] >= unit[c] and (not one_chunk_per_row or left[b] == seq_length)]
        if not able:
            return None
        row = min(able, key=lambda b: left[b])
        rows[c], starts[c] = row, seq_length - left[row]
        left[row] -= unit[c]
    room[:] = left
    return tuple(rows), tuple(starts)


@dataclass(frozen=True)
class Sharing:
    """What prefix sharing would do for a prepared set."""

    saving: float
    """Share of all positions it saves, 0 to 1."""
    longest_group: int
    """Positions of the largest group when shared: it must fit a row."""
    worth_it: bool
    """It saves more than 5 % and every group fits a row."""


def measure_sharing(prompt_lengths: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, seq_length: int) -> Sharing:
    """Compare the positions needed with and without prefix sharing.

    Args:
        prompt_lengths: [G] tokens.
        offsets: [G + 1] first sequence of each group; every group has at least one.
        lengths: [N] response tokens.
        seq_length: positions per row.
    """
    responses_G = np.diff(offsets)
    shared_G = prompt_lengths - 1 + np.add.reduceat(lengths, offsets[:-1])
    separate = int((responses_G * (prompt_lengths - 1)).sum() + lengths.sum())
    saving = 1.0 - int(shared_G.sum()) / separate
    longest = int(shared_G.max())
    return Sharing(saving, longest, saving > 0.05 and longest <= seq_length)
