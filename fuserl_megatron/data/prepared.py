"""PreparedSet: what training sees of a data set. Made by pairs.py and units.py, read by sampler.py and assemble.py.

Shapes: G prompts kept, N sequences (responses used), P pairs or triples, K sources.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fuserl_megatron.data.dataset import FusedDataset, Manifest
from fuserl_megatron.objectives.spec import Unit


@dataclass(frozen=True)
class PreparedSet:
    """Prompts, their sequences (responses used) and pairs or triples of them, as flat arrays.

    Attributes:
        dataset: where the tokens are.
        reward_temperature: the tau that gave the weights.
        group_ids: [G] data set group of each prompt kept.
        sequence_offsets: [G + 1] first sequence of each prompt.
        response_ids, source_ids, lengths: [N] int64 per sequence (lengths in scored tokens).
        weights: [N] float64; weight of the sequence where the loss is one of sequences (FuseSFT: sums to 1 per
            prompt; RLOO: that of its source; KTO: half of that), 0 where it is one of pairs or triples.
        pair_offsets: [G + 1] first pair of each prompt (all 0 where there are none).
        chosen, rejected: [P] int64 sequence index inside the prompt.
        pair_weights: [P] float64, sum to 1 per prompt.
        pair_source_ids: [P] int64.
        effective_sources: [G] effective number of sources of each prompt.
        counts: everything dropped, by name.
        statistics: mean weight per source over the prompts kept, mean effective number of sources.
        unit: what a loss term is made of; None for FuseSFT.
        of_sequences: [N] arrays that one loss reads beside, under their names in PackedBatch.
        of_pairs: [P, ...] arrays that one loss reads beside; source_index_P counts inside the prompt, as chosen does.
        fitted: what data.on_too_long left out or cut, as a short hash (too_long.py); None: nothing.
    """

    dataset: "FusedDataset | CutResponses | NextPrompts"
    reward_temperature: float
    group_ids: np.ndarray
    sequence_offsets: np.ndarray
    response_ids: np.ndarray
    source_ids: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray
    pair_offsets: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    pair_weights: np.ndarray
    pair_source_ids: np.ndarray
    effective_sources: np.ndarray
    counts: dict[str, int]
    statistics: dict[str, float]
    unit: Unit | None = None
    of_sequences: dict[str, np.ndarray] = field(default_factory=dict)
    of_pairs: dict[str, np.ndarray] = field(default_factory=dict)
    fitted: str | None = None

    @property
    def num_prompts(self) -> int:
        """Prompts kept."""
        return self.group_ids.size

    @property
    def prompt_lengths(self) -> np.ndarray:
        """[G] tokens of each prompt kept."""
        return self.dataset.prompt_lengths[self.group_ids]


def kept_prompts(prepared: PreparedSet, keep_G: np.ndarray) -> PreparedSet:
    """The set without some of its prompts ([G] bool); statistics over those that stay."""

    def part(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes_G = np.diff(offsets)
        return np.repeat(keep_G, sizes_G), np.concatenate([[0], np.cumsum(sizes_G[keep_G])])

    (of_N, sequences), (of_P, pairs) = part(prepared.sequence_offsets), part(prepared.pair_offsets)
    weights_N, sources_N, offsets = prepared.weights[of_N], prepared.source_ids[of_N], sequences
    if prepared.unit in (Unit.PAIRS, Unit.TRIPLES):
        weights_N, sources_N, offsets = prepared.pair_weights[of_P], prepared.pair_source_ids[of_P], pairs
    if prepared.unit is Unit.ALL_RESPONSES:  # a source's weight stands at each of its responses
        prompts_N = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
        first_N = np.unique(np.stack([prompts_N, sources_N]), axis=1, return_index=True)[1]
        weights_N, sources_N = weights_N[first_N], sources_N[first_N]
    names, num_prompts = prepared.dataset.sources, int(keep_G.sum())
    sums_K = np.bincount(sources_N, weights_N, minlength=len(names))
    effective_G = prepared.effective_sources[keep_G]
    return replace(
        prepared,
        group_ids=prepared.group_ids[keep_G],
        sequence_offsets=sequences,
        response_ids=prepared.response_ids[of_N],
        source_ids=prepared.source_ids[of_N],
        lengths=prepared.lengths[of_N],
        weights=prepared.weights[of_N],
        pair_offsets=pairs,
        chosen=prepared.chosen[of_P],
        rejected=prepared.rejected[of_P],
        pair_weights=prepared.pair_weights[of_P],
        pair_source_ids=prepared.pair_source_ids[of_P],
        effective_sources=effective_G,
        statistics={f"mean_weight/{n}": float(w) / num_prompts for n, w in zip(names, sums_K, strict=True)}
        | {"effective_number_of_sources": float(effective_G.mean())},
        of_sequences={name: values[of_N] for name, values in prepared.of_sequences.items()},
        of_pairs={name: values[of_P] for name, values in prepared.of_pairs.items()},
    )


class CutResponses:
    """A data set some of whose responses are shorter: they end early, without their end of turn."""

    path: Path
    manifest: Manifest
    sources: list[str]
    num_groups: int
    num_responses: int
    prompt_lengths: np.ndarray
    prompt: Callable[[int], np.ndarray]
    place: Callable[[int], str]

    def __init__(self, dataset: FusedDataset, response_ids: np.ndarray, lengths_N: np.ndarray):
        """Cut the responses ([N] ids) to these lengths."""
        self._inner, self.path, self.manifest, self.sources = dataset, dataset.path, dataset.manifest, dataset.sources
        self.num_groups, self.num_responses = dataset.num_groups, dataset.num_responses
        self.prompt_lengths, self.prompt, self.place = dataset.prompt_lengths, dataset.prompt, dataset.place
        self._room_R = dataset.response_lengths.copy()
        self._room_R[response_ids] = lengths_N

    @property
    def fingerprint(self) -> str:
        """How long each response is, as a hash."""
        return hashlib.sha256(self._room_R.tobytes()).hexdigest()

    def response(self, i: int, response_id: int) -> np.ndarray:
        """Tokens of a response of group i, as far as they go."""
        return self._inner.response(i, response_id)[: self._room_R[response_id]]


class NextPrompts:
    """A data set whose responses stand under the prompt of the next group kept (cyclic), for KTO's mismatched pairs.

    A response that would make the row longer than any of the data set's own is cut.
    """

    path: Path
    manifest: Manifest
    sources: list[str]
    num_groups: int
    num_responses: int
    prompt_lengths: np.ndarray

    def __init__(self, prepared: PreparedSet):
        """Pair every group kept with the one after it."""
        self._inner = prepared.dataset
        self.path, self.num_groups = self._inner.path, self._inner.num_groups
        self._next = np.arange(self.num_groups)
        self._next[prepared.group_ids] = np.roll(prepared.group_ids, -1)
        self.manifest, self.sources = self._inner.manifest, self._inner.sources
        self.num_responses = self._inner.num_responses
        self.prompt_lengths = self._inner.prompt_lengths[self._next]
        groups_N = np.repeat(prepared.group_ids, np.diff(prepared.sequence_offsets))
        longest = int((self._inner.prompt_lengths[groups_N] + prepared.lengths).max())
        self._room = longest - self.prompt_lengths
        self.lengths = np.minimum(prepared.lengths, self._room[groups_N])

    @property
    def fingerprint(self) -> str:
        """Which prompt each group's responses stand under, as a hash."""
        cut = (self._inner.fingerprint or "").encode()
        return hashlib.sha256(self._next.tobytes() + self._room.tobytes() + cut).hexdigest()

    def prompt(self, i: int) -> np.ndarray:
        """Tokens of the prompt that follows group i's."""
        return self._inner.prompt(int(self._next[i]))

    def response(self, i: int, response_id: int) -> np.ndarray:
        """Tokens of a response of group i, cut to the room there is."""
        return self._inner.response(i, response_id)[: self._room[i]]

    def place(self, response_id: int) -> str:
        """Where the response was read."""
        return self._inner.place(response_id)


def mismatched(prepared: PreparedSet) -> PreparedSet | None:
    """The same responses, each under the next prompt; None for a single prompt, which has no other."""
    if prepared.num_prompts < 2:
        return None
    view = NextPrompts(prepared)
    return replace(prepared, dataset=view, lengths=view.lengths)
