"""Prompts that do not fit the rows: found, named with file and line, left out or cut (data.on_too_long).

What must lie in one micro-batch (assemble.py's parts: a prompt, or one pair, triple or source of it) must fit an empty
one. `stop` refuses the first that does not. `skip` leaves the whole prompt out, for the weights of a prompt belong
together. `truncate` cuts the longest responses of the part on the right, all to the same number of positions, as far as
needed: a cut response has lost its end of turn, so the model does not learn to stop there. A prompt that leaves no room
for one response token is left out under `truncate`, too.

Shapes: G prompts, N sequences, R responses of the whole data set.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import numpy as np

from fuserl_megatron.config.schema import DataConfig
from fuserl_megatron.data.assemble import Part, chunks_of, parts_of
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.packing import fits, group_chunks, measure_sharing
from fuserl_megatron.data.prepared import CutResponses, PreparedSet, kept_prompts
from fuserl_megatron.objectives.spec import Unit
from fuserl_megatron.util.errors import UserError

UNIT_WORDS: dict[Unit | None, str] = {
    Unit.PAIRS: "a pair",
    Unit.TRIPLES: "a triple",
    Unit.ALL_RESPONSES: "all responses of a source",
}
SHARES = {"99 %": 0.99, "99.9 %": 0.999, "all": 1.0}
"""Of the prompts, for which the message says the row length that holds them."""


def parts_to_place(prepared: PreparedSet, data: DataConfig, share_prefix: bool, prompt: int) -> list[Part]:
    """What of a prompt stays in one micro-batch: all of it where it fits, otherwise what its loss needs together.

    The loss is a sum over parts with a global normaliser, so the numbers do not depend on this. A shared prefix
    needs the whole prompt in one row; KTO's single responses need nobody; without packing every sequence has a row
    of its own.
    """
    if data.packing.enabled and (share_prefix or prepared.unit is not Unit.SINGLE_RESPONSES):
        (whole,) = parts_of(prepared, prompt, True)
        chunks = chunks_of(prepared, whole, share_prefix)
        if share_prefix or fits(chunks, data.seq_length, data.micro_batch_size):
            return [whole]
    return parts_of(prepared, prompt, False)


def fitted(prepared: PreparedSet, data: DataConfig) -> PreparedSet:
    """The set as data.on_too_long wants it; under `stop`, or where everything fits, as it is.

    Raises:
        UserError: nothing is left.
    """
    if data.on_too_long == "stop":
        return prepared
    share = _shares(prepared, data)
    misfits = list(_misfits(prepared, data, share))
    if not misfits:
        return prepared
    lengths_N, keep_G = prepared.lengths.copy(), np.ones(prepared.num_prompts, bool)
    for part in misfits:
        cut = _cut(prepared, data, share, part) if data.on_too_long == "truncate" else None
        if cut is None:
            keep_G[part.prompt] = False
        else:
            lengths_N[list(part.sequences)] = cut
    if not keep_G.any():
        raise UserError(f"{prepared.dataset.path}: no prompt fits: {_how_many(prepared, data, share)}")
    kept_N = np.repeat(keep_G, np.diff(prepared.sequence_offsets))
    cut_N = kept_N & (lengths_N < prepared.lengths)
    counts = {"prompts_too_long": int((~keep_G).sum()), "responses_cut_to_fit": int(cut_N.sum())}
    if cut_N.any():
        view = CutResponses(cast(FusedDataset, prepared.dataset), prepared.response_ids, lengths_N)
        prepared = replace(prepared, dataset=view, lengths=lengths_N)
    mark = hashlib.sha256(keep_G.tobytes() + lengths_N[kept_N].tobytes()).hexdigest()[:16]
    changed = replace(prepared, counts=prepared.counts | counts, fitted=f"{data.on_too_long} {mark}")
    return changed if keep_G.all() else kept_prompts(changed, keep_G)


def check_sizes(prepared: PreparedSet, data: DataConfig, share_prefix: bool) -> None:
    """Every part must fit an empty micro-batch.

    Raises:
        UserError: the first that does not, with file and line, what to set, and how many prompts fit at which length.
    """
    rows, length, packed = data.micro_batch_size, data.seq_length, data.packing.enabled
    for part in _misfits(prepared, data, share_prefix):
        chunks = chunks_of(prepared, part, share_prefix)
        longest = max(chunks)
        largest = max(part.sequences, key=lambda n: prepared.lengths[n])
        place = prepared.dataset.place(int(prepared.response_ids[largest]))
        what = f"{place}: prompt {int(prepared.group_ids[part.prompt])}"
        others = f"; {_how_many(prepared, data, share_prefix)}; or data.on_too_long=skip, truncate"
        if longest > length:
            remedy = f"set data.seq_length to at least {longest}, or build with a smaller max_length"
            if share_prefix:
                remedy += ", or set data.packing.share_prefix=off"
            raise UserError(f"{what} needs {longest} positions in one row of {length}: {remedy}{others}")
        what += f": {len(chunks)} sequences ({UNIT_WORDS.get(prepared.unit, 'one response')})"
        if not packed:
            raise UserError(
                f"{what} need a row each in one micro-batch of {rows} rows: set data.micro_batch_size to at "
                f"least {len(chunks)}, or data.packing.enabled=true"
            )
        raise UserError(
            f"{what}, {sum(chunks)} positions, do not fit the {rows} x {length} of one micro-batch (no sequence goes "
            f"on in another row, the longest has {longest}): raise data.micro_batch_size or data.seq_length, or build "
            f"with a smaller max_length{others}"
        )


def _shares(prepared: PreparedSet, data: DataConfig) -> bool:
    """As the sampler decides; with auto every group then fits a row."""
    packing = data.packing
    if packing.share_prefix != "auto" or not packing.enabled:
        return packing.share_prefix == "on"
    sizes = prepared.prompt_lengths, prepared.sequence_offsets, prepared.lengths
    return measure_sharing(*sizes, data.seq_length).worth_it


def _misfits(prepared: PreparedSet, data: DataConfig, share_prefix: bool) -> Iterator[Part]:
    rows, length, alone = data.micro_batch_size, data.seq_length, not data.packing.enabled
    for prompt in range(prepared.num_prompts):
        for part in parts_to_place(prepared, data, share_prefix, prompt):
            if not fits(chunks_of(prepared, part, share_prefix), length, rows, alone):
                yield part


def _cut(prepared: PreparedSet, data: DataConfig, share_prefix: bool, part: Part) -> np.ndarray | None:
    """The lengths of the part's responses under the largest cap that makes them fit; None where no cap does."""
    lengths = prepared.lengths[list(part.sequences)]
    prompt = int(prepared.prompt_lengths[part.prompt])

    def room(cap: int) -> bool:
        chunks = group_chunks(prompt, np.minimum(lengths, cap).tolist(), share_prefix)
        return fits(chunks, data.seq_length, data.micro_batch_size, not data.packing.enabled)

    low, high = 0, int(lengths.max())  # the largest cap that fits lies in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if room(middle) else (low, middle)
    return np.minimum(lengths, low) if low else None


def _how_many(prepared: PreparedSet, data: DataConfig, share_prefix: bool) -> str:
    """Which shares of the prompts fit now, and at which row length 99 %, 99.9 % and all would."""
    needed: dict[int, int] = {}
    for part in _misfits(prepared, data, share_prefix):
        length = _needed_length(chunks_of(prepared, part, share_prefix), data)
        needed[part.prompt] = max(needed.get(part.prompt, 0), length)
    total, sizes = prepared.num_prompts, sorted(needed.values())
    said = f"{len(sizes)} of {total} prompts do not fit"
    if not data.packing.enabled and sizes[-1] == 0:
        return said
    steps: dict[int, str] = {}
    for name, share in SHARES.items():  # all that fit already are shorter than any of these
        rank = int(np.ceil(share * total)) - (total - len(sizes)) - 1
        if rank >= 0:
            steps[_rounded(sizes[rank])] = name
    return said + "".join(f", {share} fit data.seq_length={length}" for length, share in steps.items())


def _needed_length(chunks: list[int], data: DataConfig) -> int:
    """The shortest row with which the part fits; 0 where rows are too few, whatever their length."""
    rows, alone = data.micro_batch_size, not data.packing.enabled
    if alone and len(chunks) > rows:
        return 0
    low, high = max(max(chunks), -(-sum(chunks) // rows)) - 1, sum(chunks)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(chunks, middle, rows, alone) else (middle, high)
    return high


def _rounded(length: int) -> int:
    """Up to a multiple of 128, which every layout takes; a short one as it is."""
    return length if length < 128 else -(-length // 128) * 128
