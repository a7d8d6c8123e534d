"""What a preference loss is made of beside plain pairs: all responses (RLOO), single responses (KTO), triples (WRPO).

Selections, each prompt's weights summing to 1 over the sources that take part:
    pairs             (chosen, rejected) of each source, weight w_k
    all responses     every response of every source; the source's loss has weight w_k, its terms are means over its N
    single responses  each pair's best response as desirable, its worst as undesirable, weight w_k / 2 each
    triples           one a prompt: the target's own pair and the best response of all other sources (ties: the first
                      recorded), weight 1

Shapes: G prompts (groups), K sources, N responses of a source or sequences of the set, P pairs or triples.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from fuserl_megatron.config.objective import spec_of
from fuserl_megatron.config.schema import ObjectiveConfig
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.prepared import PreparedSet
from fuserl_megatron.data.rewards import RewardTable
from fuserl_megatron.objectives.spec import LossSpec, Unit
from fuserl_megatron.objectives.weights import (
    best_and_worst_indices,
    effective_number_of_sources,
    reward_gaps,
    rloo_advantages,
    source_weights,
)
from fuserl_megatron.util.errors import UserError

NEED_REWARDS = "sources need 2 responses with different rewards"


@dataclass(frozen=True)
class PairTable:
    """Each source's best and worst response to each prompt (data set ids), and whether they make a pair."""

    chosen_GK: torch.Tensor
    rejected_GK: torch.Tensor
    has_pair_GK: torch.Tensor
    counts: dict[str, int]
    """Why there is no pair, by name; prompts_without_pair."""

    def ids(self, groups_P: np.ndarray, sources_P: np.ndarray | int) -> list[np.ndarray]:
        """[P] chosen and [P] rejected responses of these prompts and sources."""
        return [ids_GK.numpy()[groups_P, sources_P] for ids_GK in (self.chosen_GK, self.rejected_GK)]


@dataclass(frozen=True)
class Selection:
    """What a stage's set is prepared from."""

    dataset: FusedDataset
    objective: ObjectiveConfig
    reward_temperature: float
    table: RewardTable
    scores_GK: torch.Tensor
    pairs: PairTable | None = None
    """None for FuseSFT."""

    @property
    def pair_table(self) -> PairTable:
        """Of FusePO."""
        assert self.pairs is not None
        return self.pairs


def prepare_preference(selection: Selection) -> PreparedSet:
    """The prepared set of a FusePO loss.

    Raises:
        UserError: no prompt is left, or the data lack what the loss reads (with the remedy).
    """
    spec = spec_of(selection.objective)
    match spec.unit:
        case Unit.ALL_RESPONSES:
            return _all_responses(selection)
        case Unit.TRIPLES:
            return _triples(selection)
        case Unit.SINGLE_RESPONSES:
            return _single_responses(selection)
    return _pairs(selection, spec)


def _pairs(selection: Selection, spec: LossSpec) -> PreparedSet:
    groups_P, sources_P, weights_GK, counts = _weighted_pairs(selection)
    ids_P2 = selection.pair_table.ids(groups_P, sources_P)
    beside: dict[str, np.ndarray] = {}
    if "reward_gaps_P" in spec.needs:
        rewards_P2 = [torch.from_numpy(selection.dataset.rewards[ids_P]) for ids_P in ids_P2]
        try:
            beside["reward_gaps_P"] = reward_gaps(*rewards_P2).numpy()
        except ValueError as error:
            raise UserError(f"{selection.dataset.path}: {error}") from None
    if "source_present_PK" in spec.needs:
        beside |= _source_logps(selection.dataset, spec.name, *ids_P2)
    return _of_pairs(selection, groups_P, sources_P, ids_P2, weights_GK, counts, Unit.PAIRS, beside)


def _triples(selection: Selection) -> PreparedSet:
    dataset, name = selection.dataset, selection.objective.target_source
    if name not in dataset.sources:
        have = ", ".join(dataset.sources)
        raise UserError(f"objective.target_source={name}: {dataset.path} has no such source (it has: {have}).")
    target = dataset.sources.index(name)
    present_GK = selection.table.mask_GKN.any(dim=2)
    others_GK = present_GK.clone()
    others_GK[:, target] = False
    own_G, strong_G = selection.pair_table.has_pair_GK[:, target], others_GK.any(dim=1)
    counts = {k: v for k, v in selection.pair_table.counts.items() if not k.startswith("prompts_")}
    counts |= {
        "prompts_without_own_pair": int((~own_G).sum()),
        "prompts_without_other_source": int((own_G & ~strong_G).sum()),
    }
    kept_G = own_G & strong_G
    need = f"source {name} needs 2 responses with different rewards, and others beside it"
    _stop_if_empty(dataset, kept_G, counts, need)
    # the best response over all other sources, by raw reward; ties: the first recorded
    rewards_GR = selection.table.rewards_GKN.masked_fill(~(selection.table.mask_GKN & others_GK[..., None]), -torch.inf)
    ids_GR, rewards_GR = selection.table.response_ids_GKN.flatten(1), rewards_GR.flatten(1)
    top_GR = (rewards_GR == rewards_GR.amax(dim=1, keepdim=True)) & (ids_GR >= 0)
    best_G = torch.where(top_GR, ids_GR, torch.iinfo(torch.int64).max).amin(dim=1)
    groups_P = np.flatnonzero(kept_G.numpy())
    best_P = best_G.numpy()[groups_P]
    ids_P3 = [*selection.pair_table.ids(groups_P, target), best_P]
    sources_P = dataset.source_ids[best_P]
    weights_GK = torch.zeros_like(selection.scores_GK)
    weights_GK[groups_P, sources_P] = 1.0
    return _of_pairs(selection, groups_P, sources_P, ids_P3, weights_GK, counts, Unit.TRIPLES, {})


def _single_responses(selection: Selection) -> PreparedSet:
    groups_P, sources_P, weights_GK, counts = _weighted_pairs(selection)
    chosen_P, rejected_P = selection.pair_table.ids(groups_P, sources_P)
    ids_N = np.sort(np.concatenate([chosen_P, rejected_P]))
    groups_N = np.searchsorted(selection.dataset.response_offsets, ids_N, side="right") - 1
    weights_N = weights_GK.numpy()[groups_N, selection.dataset.source_ids[ids_N]] / 2
    beside, group_ids = {"desirable_N": np.isin(ids_N, chosen_P)}, np.unique(groups_P)
    return of_sequences(selection, group_ids, ids_N, weights_N, weights_GK, counts, Unit.SINGLE_RESPONSES, beside)


def _all_responses(selection: Selection) -> PreparedSet:
    dataset, table = selection.dataset, selection.table
    present_GK = table.mask_GKN.any(dim=2)
    weights_GK = source_weights(selection.scores_GK, present_GK, selection.reward_temperature)
    advantages_GKN = rloo_advantages(table.rewards_GKN, table.mask_GKN)
    silent_GK = present_GK & (advantages_GKN == 0).all(dim=2)
    counts = {
        "zero_weight": int((present_GK & (weights_GK == 0)).sum()),
        "sources_without_advantage": int(silent_GK.sum()),
    }
    _stop_if_empty(dataset, (~silent_GK & present_GK).any(dim=1), counts, NEED_REWARDS)
    best_GK = best_and_worst_indices(table.rewards_GKN, table.mask_GKN)[0]
    is_best_GKN = torch.zeros_like(table.mask_GKN).scatter_(2, best_GK[..., None], True)
    keep_GKN = table.mask_GKN & (weights_GK > 0)[..., None]
    weights_GKN = weights_GK[..., None].expand_as(table.rewards_GKN)
    ids_N, weights_N, advantages_N, best_N = table.flat(keep_GKN, weights_GKN, advantages_GKN, is_best_GKN)
    beside, group_ids = {"advantages_N": advantages_N, "best_N": best_N}, np.arange(dataset.num_groups)
    return of_sequences(selection, group_ids, ids_N, weights_N, weights_GK, counts, Unit.ALL_RESPONSES, beside)


def _weighted_pairs(selection: Selection) -> tuple[np.ndarray, np.ndarray, torch.Tensor, dict[str, int]]:
    """Groups and sources [P] of the pairs that count, the weights [G, K] over sources with a pair, what is dropped."""
    counts, has_pair_GK = dict(selection.pair_table.counts), selection.pair_table.has_pair_GK
    _stop_if_empty(selection.dataset, has_pair_GK.any(dim=1), counts, NEED_REWARDS)
    weights_GK = source_weights(selection.scores_GK, has_pair_GK, selection.reward_temperature)
    counts["zero_weight"] = int((has_pair_GK & (weights_GK == 0)).sum())
    groups_P, sources_P = (a.numpy() for a in (has_pair_GK & (weights_GK > 0)).nonzero(as_tuple=True))
    return groups_P, sources_P, weights_GK, counts


def _stop_if_empty(dataset: FusedDataset, kept_G: torch.Tensor, counts: dict[str, int], need: str) -> None:
    if not bool(kept_G.any()):
        why = ", ".join(f"{name} {n}" for name, n in counts.items() if n)
        raise UserError(f"{dataset.path}: no prompt has a pair ({why}): {need}")


def _of_pairs(
    selection: Selection,
    groups_P: np.ndarray,
    sources_P: np.ndarray,
    ids: list[np.ndarray],
    weights_GK: torch.Tensor,
    counts: dict[str, int],
    unit: Unit,
    beside: dict[str, np.ndarray],
) -> PreparedSet:
    """A set of pairs (ids: chosen, rejected) or triples (and the source response); a response has one place in it."""
    group_ids = np.unique(groups_P)
    ids_N = np.unique(np.concatenate(ids))  # ascending ids: prompt by prompt
    found = of_sequences(selection, group_ids, ids_N, np.zeros(ids_N.size), weights_GK, counts, unit, {})
    prompts_P = np.searchsorted(group_ids, groups_P)
    index = [np.searchsorted(ids_N, ids_P) - found.sequence_offsets[prompts_P] for ids_P in ids]
    if unit is Unit.TRIPLES:
        beside = {"source_index_P": index[2], **beside}
    return replace(
        found,
        pair_offsets=np.searchsorted(prompts_P, np.arange(group_ids.size + 1)),
        chosen=index[0],
        rejected=index[1],
        pair_weights=weights_GK.numpy()[groups_P, sources_P],
        pair_source_ids=sources_P,
        of_pairs=beside,
    )


def of_sequences(
    selection: Selection,
    group_ids: np.ndarray,
    ids_N: np.ndarray,
    weights_N: np.ndarray,
    weights_GK: torch.Tensor,
    counts: dict[str, int],
    unit: Unit | None,
    beside: dict[str, np.ndarray],
) -> PreparedSet:
    """A set of weighted sequences without pairs.

    Args:
        selection: where they are from.
        group_ids: [G] prompts kept.
        ids_N: responses used, ascending.
        weights_N: the weight of each.
        weights_GK: each source's weight for every prompt of the data set, for the statistics.
        counts: everything dropped, by name.
        unit: what a loss term is made of; None for FuseSFT.
        beside: [N] arrays that the loss reads beside, by their names in PackedBatch.
    """
    dataset = selection.dataset
    offsets = np.append(np.searchsorted(ids_N, dataset.response_offsets[group_ids]), ids_N.size)
    kept_GK = weights_GK[group_ids]
    effective_G = effective_number_of_sources(kept_GK)
    means = {f"mean_weight/{name}": float(w) for name, w in zip(dataset.sources, kept_GK.mean(dim=0), strict=True)}
    none = np.zeros(0, np.int64)
    return PreparedSet(
        dataset=dataset,
        reward_temperature=selection.reward_temperature,
        group_ids=group_ids,
        sequence_offsets=offsets,
        response_ids=ids_N,
        source_ids=dataset.source_ids[ids_N],
        lengths=dataset.response_lengths[ids_N],
        weights=weights_N,
        pair_offsets=np.zeros(offsets.size, np.int64),
        chosen=none,
        rejected=none,
        pair_weights=np.zeros(0),
        pair_source_ids=none,
        effective_sources=effective_G.numpy(),
        counts=counts,
        statistics={**means, "effective_number_of_sources": float(effective_G.mean())},
        unit=unit,
        of_sequences=beside,
    )


def _source_logps(
    dataset: FusedDataset, loss: str, chosen_P: np.ndarray, rejected_P: np.ndarray
) -> dict[str, np.ndarray]:
    """InfiFPO's [P, K] columns; a source counts for a pair where it has a value for both responses."""
    if dataset.source_mean_logps is None:
        raise UserError(
            f"{dataset.path}: objective.loss={loss} reads the sources' own log-probabilities: add the field "
            "source_mean_logps to the records and build again (docs/data_format.md)."
        )
    chosen_PK, rejected_PK = dataset.source_mean_logps[chosen_P], dataset.source_mean_logps[rejected_P]
    present_PK = ~(np.isnan(chosen_PK) | np.isnan(rejected_PK))
    if not present_PK.any():
        raise UserError(
            f"{dataset.path}: objective.loss={loss}: no pair has source_mean_logps of one source for both responses; "
            "add them to the records and build again."
        )
    return {
        "source_chosen_mean_logps_PK": np.where(present_PK, chosen_PK, 0.0),
        "source_rejected_mean_logps_PK": np.where(present_PK, rejected_PK, 0.0),
        "source_present_PK": present_PK,
    }
