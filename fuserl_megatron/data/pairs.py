"""Selection: which responses of each prompt are used, with which weights, and which of them form pairs.

FuseSFT, per_source: the best response of each source (ties: the first recorded), weighted with the source's weight.
FuseSFT, top_m: the M best responses of the prompt's pool, weighted with the softmax of their own rewards / tau.
FusePO: the best and the worst response of each source; the weights are the softmax over the sources that have a pair,
so they sum to 1 for every prompt that is counted. No pair: a single response, equal rewards, equal tokens, or a gap
outside the filter. A prompt without a pair leaves the set.
Items of weight exactly 0 (tau = 0) are left out: they add nothing to the loss. Everything dropped is counted.

Shapes: G prompts (groups), K sources, N responses of a source or sequences of the set, P pairs. All prompts are handled
at once.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from fuserl_megatron.config.schema import ObjectiveConfig, UserError
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.rewards import RewardTable, reward_table
from fuserl_megatron.objectives.weights import (
    best_and_worst_indices,
    effective_number_of_sources,
    source_weights,
    top_m_mask,
    top_m_weights,
)

DEFAULT_TOP_M = 4


@dataclass(frozen=True)
class PreparedSet:
    """What training sees of a data set: prompts, their sequences (responses used) and pairs, as flat arrays.

    Attributes:
        dataset: where the tokens are.
        stage: "fusesft" or "fusepo".
        reward_temperature: the tau that gave the weights.
        group_ids: [G] data set group of each prompt kept.
        sequence_offsets: [G + 1] first sequence of each prompt.
        response_ids, source_ids, lengths: [N] int64 per sequence (lengths in scored tokens).
        weights: [N] float64; sum to 1 per prompt for FuseSFT, 0 for FusePO.
        pair_offsets: [G + 1] first pair of each prompt (all 0 for FuseSFT).
        chosen, rejected: [P] int64 sequence index inside the prompt.
        pair_weights: [P] float64, sum to 1 per prompt.
        pair_source_ids: [P] int64.
        counts: everything dropped, by name.
        statistics: mean weight per source over the prompts kept, mean effective number of sources.
    """

    dataset: FusedDataset
    stage: str
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
    counts: dict[str, int]
    statistics: dict[str, float]

    @property
    def num_prompts(self) -> int:
        """Prompts kept."""
        return self.group_ids.size

    @property
    def prompt_lengths(self) -> np.ndarray:
        """[G] tokens of each prompt kept."""
        return self.dataset.prompt_lengths[self.group_ids]


def prepare(dataset: FusedDataset, objective: ObjectiveConfig, reward_temperature: float | None = None) -> PreparedSet:
    """Select responses and pairs for one stage.

    Args:
        dataset: the fused data set.
        objective: stage, selection, top_m and the reward gap filter are read.
        reward_temperature: tau; None takes the one the data set was built with.

    Raises:
        UserError: tau is negative or NaN, an unknown setting, or no prompt is left.
    """
    manifest = dataset.manifest
    tau = manifest.reward_temperature if reward_temperature is None else reward_temperature
    table = reward_table(dataset.response_offsets, dataset.source_ids, dataset.rewards, len(dataset.sources))
    scores_GK = table.scores(manifest.reward_standardization, manifest.score_aggregation)
    try:
        if objective.stage == "fusepo":
            return _prepare_pairs(dataset, objective, tau, table, scores_GK)
        if (objective.selection or "per_source") == "per_source":
            weights_GK = source_weights(scores_GK, None, tau)
            best_GK = best_and_worst_indices(table.rewards_GKN, table.mask_GKN)[0]
            weights_GKN = torch.zeros_like(table.rewards_GKN).scatter_(2, best_GK[..., None], weights_GK[..., None])
            selected_GKN = torch.zeros_like(table.mask_GKN).scatter_(2, best_GK[..., None], True) & table.mask_GKN
        else:
            top_m = DEFAULT_TOP_M if objective.top_m is None else objective.top_m
            weights_GKN, selected_GKN = _top_m(table, table.scaled(manifest.reward_standardization), top_m, tau)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    counts = {"zero_weight": int((selected_GKN & (weights_GKN == 0)).sum())}
    keep_GKN = selected_GKN & (weights_GKN > 0)
    ids_N, order_N, offsets = _flat(table.response_ids_GKN, keep_GKN)
    none, no_pairs = np.zeros(0, np.int64), np.zeros(offsets.size, np.int64)
    return PreparedSet(
        dataset=dataset,
        stage="fusesft",
        reward_temperature=tau,
        group_ids=np.arange(dataset.num_groups),
        sequence_offsets=offsets,
        response_ids=ids_N,
        source_ids=dataset.source_ids[ids_N],
        lengths=dataset.response_lengths[ids_N],
        weights=weights_GKN.numpy()[keep_GKN.numpy()][order_N],
        pair_offsets=no_pairs,
        chosen=none,
        rejected=none,
        pair_weights=np.zeros(0),
        pair_source_ids=none,
        counts=counts,
        statistics=_statistics(dataset, weights_GKN.sum(dim=2)),
    )


def _top_m(table: RewardTable, scaled_GKN: torch.Tensor, m: int, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[G, K, N] weights and selection of the M best of each pool; ties go to the response recorded first."""
    shape = table.rewards_GKN.shape
    ids_GR = table.response_ids_GKN.flatten(1)
    absent = torch.iinfo(torch.int64).max
    order_GR = torch.where(ids_GR < 0, absent, ids_GR).argsort(dim=1)
    rewards_GR, mask_GR = (t.flatten(1).gather(1, order_GR) for t in (scaled_GKN, table.mask_GKN))
    weights_GR, selected_GR = top_m_weights(rewards_GR, m, tau, mask_GR), top_m_mask(rewards_GR, m, mask_GR)
    back_GR = order_GR.argsort(dim=1)
    return weights_GR.gather(1, back_GR).reshape(shape), selected_GR.gather(1, back_GR).reshape(shape)


@dataclass(frozen=True)
class PairTable:
    """Each source's best and worst response to each prompt (data set ids), and whether they make a pair."""

    chosen_GK: torch.Tensor
    rejected_GK: torch.Tensor
    has_pair_GK: torch.Tensor
    counts: dict[str, int]
    """Why there is no pair, by name; prompts_without_pair."""


def pair_table(dataset: FusedDataset, objective: ObjectiveConfig, table: RewardTable) -> PairTable:
    """Pairs inside each source: argmax and argmin of the rewards, with everything dropped counted.

    Args:
        dataset: its tokens are compared.
        objective: min_reward_gap and max_reward_gap are read.
        table: the data set's rewards.
    """
    counts: Counter[str] = Counter()
    best_GK, worst_GK, has_pair_GK = best_and_worst_indices(table.rewards_GKN, table.mask_GKN)
    num_GK = table.mask_GKN.sum(dim=2)
    counts["no_pair_single_response"] = int((num_GK == 1).sum())
    counts["no_pair_equal_rewards"] = int(((num_GK > 1) & ~has_pair_GK).sum())

    def pick(values_GKN: torch.Tensor, index_GK: torch.Tensor) -> torch.Tensor:
        return values_GKN.gather(2, index_GK[..., None]).squeeze(2)

    chosen_GK, rejected_GK = pick(table.response_ids_GKN, best_GK), pick(table.response_ids_GKN, worst_GK)
    equal_GK = _equal_tokens(dataset, chosen_GK, rejected_GK, has_pair_GK)
    counts["no_pair_equal_tokens"] = int(equal_GK.sum())
    has_pair_GK = has_pair_GK & ~equal_GK
    gap_GK = pick(table.rewards_GKN, best_GK) - pick(table.rewards_GKN, worst_GK)
    outside_GK = torch.zeros_like(has_pair_GK)
    if objective.min_reward_gap is not None:
        outside_GK |= gap_GK < objective.min_reward_gap
    if objective.max_reward_gap is not None:
        outside_GK |= gap_GK > objective.max_reward_gap
    counts["no_pair_reward_gap"] = int((has_pair_GK & outside_GK).sum())
    has_pair_GK = has_pair_GK & ~outside_GK
    counts["prompts_without_pair"] = int((~has_pair_GK.any(dim=1)).sum())
    return PairTable(chosen_GK, rejected_GK, has_pair_GK, dict(counts))


def _prepare_pairs(
    dataset: FusedDataset, objective: ObjectiveConfig, tau: float, table: RewardTable, scores_GK: torch.Tensor
) -> PreparedSet:
    pairs = pair_table(dataset, objective, table)
    counts, has_pair_GK = dict(pairs.counts), pairs.has_pair_GK
    kept_G = has_pair_GK.any(dim=1)
    if not bool(kept_G.any()):
        why = ", ".join(f"{name} {n}" for name, n in counts.items() if n)
        raise UserError(
            f"{dataset.path}: no prompt has a pair ({why}): sources need 2 responses with different rewards"
        )
    weights_GK = source_weights(scores_GK, has_pair_GK, tau)
    counts["zero_weight"] = int((has_pair_GK & (weights_GK == 0)).sum())
    keep_GK = has_pair_GK & (weights_GK > 0)

    groups_P, sources_P = (a.numpy() for a in keep_GK.nonzero(as_tuple=True))
    group_ids = np.flatnonzero(kept_G.numpy())
    prompts_P = np.searchsorted(group_ids, groups_P)
    used = np.stack([pairs.chosen_GK.numpy()[groups_P, sources_P], pairs.rejected_GK.numpy()[groups_P, sources_P]])
    ids_N = np.unique(used)  # ascending ids: prompt by prompt; a response belongs to one source, so to one pair
    first_id_G = dataset.response_offsets[group_ids]
    sequence_offsets = np.append(np.searchsorted(ids_N, first_id_G), ids_N.size)
    chosen_P, rejected_P = np.searchsorted(ids_N, used) - sequence_offsets[prompts_P]
    return PreparedSet(
        dataset=dataset,
        stage="fusepo",
        reward_temperature=tau,
        group_ids=group_ids,
        sequence_offsets=sequence_offsets,
        response_ids=ids_N,
        source_ids=dataset.source_ids[ids_N],
        lengths=dataset.response_lengths[ids_N],
        weights=np.zeros(ids_N.size),
        pair_offsets=np.searchsorted(prompts_P, np.arange(group_ids.size + 1)),
        chosen=chosen_P,
        rejected=rejected_P,
        pair_weights=weights_GK.numpy()[groups_P, sources_P],
        pair_source_ids=sources_P,
        counts=counts,
        statistics=_statistics(dataset, weights_GK[kept_G]),
    )


def _equal_tokens(
    dataset: FusedDataset, first_GK: torch.Tensor, second_GK: torch.Tensor, where_GK: torch.Tensor
) -> torch.Tensor:
    """[G, K] bool: both responses have the same tokens (only looked at where lengths agree)."""
    lengths_R = torch.from_numpy(dataset.response_lengths)
    candidates = where_GK & (lengths_R[first_GK.clamp(min=0)] == lengths_R[second_GK.clamp(min=0)])
    equal_GK = torch.zeros_like(where_GK)
    for g, k in candidates.nonzero().tolist():
        a, b = dataset.response(g, int(first_GK[g, k])), dataset.response(g, int(second_GK[g, k]))
        equal_GK[g, k] = np.array_equal(a, b)
    return equal_GK


def _flat(ids_GKN: torch.Tensor, keep_GKN: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids kept in ascending order (so prompt by prompt), the order that sorts them, and offsets [G + 1]."""
    ids_N = ids_GKN.numpy()[keep_GKN.numpy()]
    order_N = np.argsort(ids_N)
    per_group = keep_GKN.sum(dim=(1, 2)).numpy()
    return ids_N[order_N], order_N, np.concatenate([[0], np.cumsum(per_group)])


def _statistics(dataset: FusedDataset, weights_GK: torch.Tensor) -> dict[str, float]:
    means = {f"mean_weight/{name}": float(w) for name, w in zip(dataset.sources, weights_GK.mean(dim=0), strict=True)}
    return {**means, "effective_number_of_sources": float(effective_number_of_sources(weights_GK).mean())}
