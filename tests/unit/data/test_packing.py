"""The layout of integers: everything placed once, nothing overlaps, units stay together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserl_megatron.data.packing import fits, group_chunks, measure_sharing, pack

SEQ_LENGTH, ROWS = 24, 3
UNITS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=25)


@settings(max_examples=150, deadline=None)
@given(UNITS, st.booleans())
def test_every_chunk_once_inside_the_rows_without_overlap(units, one_chunk_per_row):
    units = [u for u in units if fits(u, SEQ_LENGTH, ROWS, one_chunk_per_row)]
    placements = pack(units, SEQ_LENGTH, ROWS, one_chunk_per_row)
    assert len(placements) == len(units)
    taken, chunks_in_row = {}, {}
    for unit, place in zip(units, placements, strict=True):
        assert len(place.rows) == len(place.starts) == len(unit)
        for length, row, start in zip(unit, place.rows, place.starts, strict=True):
            assert 0 <= row < ROWS and 0 <= start and start + length <= SEQ_LENGTH
            cells = taken.setdefault((place.micro_batch, row), set())
            assert cells.isdisjoint(range(start, start + length))
            cells.update(range(start, start + length))
            chunks_in_row[place.micro_batch, row] = chunks_in_row.get((place.micro_batch, row), 0) + 1
    assert {p.micro_batch for p in placements} == set(range(max((p.micro_batch for p in placements), default=-1) + 1))
    for cells in taken.values():
        assert cells == set(range(len(cells)))  # rows fill from the left without holes
    if one_chunk_per_row:
        assert set(chunks_in_row.values()) <= {1}
    assert pack(units, SEQ_LENGTH, ROWS, one_chunk_per_row) == placements


@settings(max_examples=50, deadline=None)
@given(UNITS)
def test_no_two_micro_batches_could_be_one(units):
    """First fit: a unit of a later micro-batch never fits into what an earlier one has left over in total."""
    units = [[sum(u) % 20 + 1] for u in units]
    placements = pack(units, SEQ_LENGTH, 1)
    filled = {}
    for unit, place in zip(units, placements, strict=True):
        filled[place.micro_batch] = filled.get(place.micro_batch, 0) + unit[0]
    for unit, place in zip(units, placements, strict=True):
        for earlier in range(place.micro_batch):
            assert filled[earlier] + unit[0] > SEQ_LENGTH


def test_chunks_and_a_unit_that_does_not_fit():
    assert group_chunks(5, [3, 1], share_prefix=False) == [7, 5]
    assert group_chunks(5, [3, 1], share_prefix=True) == [8]
    assert group_chunks(1, [3], share_prefix=True) == group_chunks(1, [3], share_prefix=False) == [3]
    assert fits([6, 6, 6], 6, 3) and not fits([7], 6, 3) and not fits([4, 4, 4], 6, 2) and fits([3, 3, 3], 6, 2)
    assert not fits([3, 3, 3], 6, 2, one_chunk_per_row=True)
    with pytest.raises(ValueError, match=r"unit 1 with chunks \[4, 4, 4\] does not fit 2 rows of 6"):
        pack([[1], [4, 4, 4]], 6, 2)


def test_measured_sharing():
    prompts, offsets, lengths = np.array([101, 11]), np.array([0, 4, 6]), np.array([20, 20, 20, 20, 10, 10])
    sharing = measure_sharing(prompts, offsets, lengths, 200)
    separate, shared = 4 * 120 + 2 * 20, 180 + 30
    assert sharing.saving == pytest.approx(1 - shared / separate)
    assert sharing.longest_group == 180 and sharing.worth_it
    assert not measure_sharing(prompts, offsets, lengths, 179).worth_it
    assert not measure_sharing(np.array([2, 2]), offsets, lengths, 200).worth_it
