"""From placements to tensors: writes sequences into rows and makes one PackedBatch.

Shapes: B rows, S tokens per row, N sequences, P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fuserl_megatron.data.batch import IGNORE_INDEX, PackedBatch
from fuserl_megatron.data.packing import Placement, attended_keys, group_chunks
from fuserl_megatron.data.prepared import PreparedSet
from fuserl_megatron.objectives.spec import Unit


@dataclass(frozen=True)
class Part:
    """What must lie in one micro-batch: a whole prompt, or (packing off) one pair, triple, source or sequence of it."""

    prompt: int
    """Index into the prepared set."""
    sequences: tuple[int, ...]
    """Sequence indices into the prepared set."""
    pairs: tuple[int, ...]
    """Pair indices into the prepared set."""


def parts_of(prepared: PreparedSet, prompt: int, whole: bool) -> list[Part]:
    """One part per prompt (`whole`), or its pairs, triples, sources (RLOO) or sequences (FuseSFT, KTO) one by one."""
    first, last = int(prepared.sequence_offsets[prompt]), int(prepared.sequence_offsets[prompt + 1])
    pairs = range(int(prepared.pair_offsets[prompt]), int(prepared.pair_offsets[prompt + 1]))
    if whole:
        return [Part(prompt, tuple(range(first, last)), tuple(pairs))]
    if prepared.unit is Unit.ALL_RESPONSES:
        by_source: dict[int, list[int]] = {}
        for n in range(first, last):
            by_source.setdefault(int(prepared.source_ids[n]), []).append(n)
        return [Part(prompt, tuple(responses), ()) for responses in by_source.values()]
    if pairs:
        ends = [prepared.chosen, prepared.rejected, *(v for k, v in prepared.of_pairs.items() if k == "source_index_P")]
        return [Part(prompt, tuple(first + int(end[p]) for end in ends), (p,)) for p in pairs]
    return [Part(prompt, (n,), ()) for n in range(first, last)]


def chunks_of(prepared: PreparedSet, part: Part, share_prefix: bool) -> list[int]:
    """Chunk lengths of a part (see packing.py)."""
    lengths = [int(prepared.lengths[n]) for n in part.sequences]
    return group_chunks(int(prepared.dataset.prompt_lengths[prepared.group_ids[part.prompt]]), lengths, share_prefix)


def attended_keys_of(prepared: PreparedSet, part: Part, share_prefix: bool) -> int:
    """Keys that the part's positions see in all (see packing.py)."""
    prompt = int(prepared.dataset.prompt_lengths[prepared.group_ids[part.prompt]])
    return attended_keys(prompt, prepared.lengths[list(part.sequences)], share_prefix)


def assemble(
    prepared: PreparedSet, items: Sequence[tuple[Part, Placement]], num_rows: int, seq_length: int, share_prefix: bool
) -> PackedBatch:
    """One micro-batch [B, S] on the CPU.

    `items` are its parts with their places, packed under the same `share_prefix`; none gives a batch of padding with
    N = P = 0.
    """
    shape = (num_rows, seq_length)
    tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    segments, parents, sequence_ids = (np.full(shape, -1, np.int64) for _ in range(3))
    next_segment = [0] * num_rows
    sequences: list[int] = []
    prompts: list[int] = []
    pairs: list[int] = []  # indices into the prepared set
    ends = {"chosen_index_P": prepared.chosen, "rejected_index_P": prepared.rejected} | {
        name: values for name, values in prepared.of_pairs.items() if name == "source_index_P"
    }
    index_P: dict[str, list[int]] = {name: [] for name in ends}

    def write(row: int, start: int, first_position: int, inputs: np.ndarray, parent: int | None) -> int:
        """Tokens of one segment; returns its id. parent None: its own."""
        segment = next_segment[row]
        next_segment[row] += 1
        span = slice(start, start + inputs.size)
        tokens[row, span] = inputs
        positions[row, span] = np.arange(first_position, first_position + inputs.size)
        segments[row, span] = segment
        parents[row, span] = segment if parent is None else parent
        return segment

    def score(row: int, start: int, response: np.ndarray, n: int) -> None:
        labels[row, start : start + response.size] = response
        sequence_ids[row, start : start + response.size] = n

    for part, place in items:
        group = int(prepared.group_ids[part.prompt])
        prompt = prepared.dataset.prompt(group)
        batch_index = {}
        shared, cursor = None, 0
        if share_prefix:
            row, cursor = place.rows[0], place.starts[0]
            if prompt.size > 1:
                shared = write(row, cursor, 0, prompt[:-1], None)
                cursor += prompt.size - 1
        for i, n in enumerate(part.sequences):
            response = prepared.dataset.response(group, int(prepared.response_ids[n]))
            batch_index[n] = len(sequences)
            if share_prefix:
                write(row, cursor, prompt.size - 1, np.concatenate([prompt[-1:], response[:-1]]), shared)
                score(row, cursor, response, len(sequences))
                cursor += response.size
            else:
                row, start = place.rows[i], place.starts[i]
                write(row, start, 0, np.concatenate([prompt, response[:-1]]), None)
                score(row, start + prompt.size - 1, response, len(sequences))
            sequences.append(n)
            prompts.append(group)
        first = int(prepared.sequence_offsets[part.prompt])
        for name, values in ends.items():
            index_P[name].extend(batch_index[first + int(values[p])] for p in part.pairs)
        pairs.extend(part.pairs)

    n_N, p_P = np.array(sequences, np.int64), np.array(pairs, np.int64)
    arrays = {
        "tokens_BS": tokens,
        "labels_BS": labels,
        "positions_BS": positions,
        "segment_ids_BS": segments,
        "parent_ids_BS": parents,
        "sequence_ids_BS": sequence_ids,
        "lengths_N": prepared.lengths[n_N],
        "weights_N": prepared.weights[n_N],
        "source_ids_N": prepared.source_ids[n_N],
        "prompt_ids_N": np.array(prompts, np.int64),
        "response_ids_N": prepared.response_ids[n_N],
        "pair_weights_P": prepared.pair_weights[p_P],
        "pair_source_ids_P": prepared.pair_source_ids[p_P],
        **{name: values[n_N] for name, values in prepared.of_sequences.items()},
        **{name: values[p_P] for name, values in prepared.of_pairs.items()},
        **{name: np.array(index, np.int64) for name, index in index_P.items()},
    }
    if prepared.unit is Unit.ALL_RESPONSES:
        keys_N2 = np.stack([arrays["prompt_ids_N"], arrays["source_ids_N"]], axis=1)
        arrays["group_ids_N"] = np.unique(keys_N2, axis=0, return_inverse=True)[1].reshape(-1)
    return PackedBatch(**{name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()})
