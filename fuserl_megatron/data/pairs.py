"""Selection: which responses of each prompt are used, with which weights, and which of them form pairs.

FuseSFT, per_source: the best response of each source (ties: the first recorded), weighted with the source's weight.
FuseSFT, top_m: the M best responses of the prompt's pool, weighted with the softmax of their own rewards / tau.
FusePO: the best and the worst response of each source (or what else the loss is made of: units.py); the weights are the
softmax over the sources that have a pair, so they sum to 1 for every prompt that is counted. No pair: a single
response, equal rewards, equal tokens, or a gap outside the filter. A prompt without a pair leaves the set.
Items of weight exactly 0 (tau = 0) are left out: they add nothing to the loss. Everything dropped is counted.

Shapes: G prompts (groups), K sources, N responses of a source or sequences of the set, P pairs. All prompts are handled
at once.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import torch

from fuserl_megatron.config.objective import DEFAULT_TOP_M
from fuserl_megatron.config.schema import ObjectiveConfig
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.prepared import PreparedSet
from fuserl_megatron.data.rewards import RewardTable, reward_table
from fuserl_megatron.data.units import PairTable, Selection, of_sequences, prepare_preference
from fuserl_megatron.objectives.weights import best_and_worst_indices, source_weights, top_m_mask
from fuserl_megatron.util.errors import UserError


def prepare(dataset: FusedDataset, objective: ObjectiveConfig, reward_temperature: float | None = None) -> PreparedSet:
    """Select responses and pairs for one stage; without a temperature tau, with the one the data set was built with.

    Raises:
        UserError: tau is negative or NaN, an unknown setting, or no prompt is left.
    """
    manifest = dataset.manifest
    tau = manifest.reward_temperature if reward_temperature is None else reward_temperature
    table = reward_table(dataset.response_offsets, dataset.source_ids, dataset.rewards, len(dataset.sources))
    try:
        scores_GK = table.scores(manifest.reward_standardization, manifest.score_aggregation)
        selection = Selection(dataset, objective, tau, table, scores_GK)
        if objective.stage == "fusepo":
            return prepare_preference(replace(selection, pairs=pair_table(dataset, objective, table)))
        if (objective.selection or "per_source") == "per_source":
            weights_GK = source_weights(scores_GK, None, tau)
            best_GK = best_and_worst_indices(table.rewards_GKN, table.mask_GKN)[0]
            weights_GKN = torch.zeros_like(table.rewards_GKN).scatter_(2, best_GK[..., None], weights_GK[..., None])
            selected_GKN = torch.zeros_like(table.mask_GKN).scatter_(2, best_GK[..., None], True) & table.mask_GKN
        else:
            top_m = DEFAULT_TOP_M if objective.top_m is None else objective.top_m
            weights_GKN, selected_GKN = _top_m(table, table.scaled(manifest.reward_standardization), top_m, tau)
    except ValueError as error:
        raise UserError(str(error)) from None
    counts = {"zero_weight": int((selected_GKN & (weights_GKN == 0)).sum())}
    ids_N, weights_N = table.flat(selected_GKN & (weights_GKN > 0), weights_GKN)
    group_ids = np.arange(dataset.num_groups)
    return of_sequences(selection, group_ids, ids_N, weights_N, weights_GKN.sum(dim=2), counts, None, {})


def _top_m(table: RewardTable, scaled_GKN: torch.Tensor, m: int, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[G, K, N] weights and selection of the M best of each pool; ties go to the response recorded first."""
    shape = table.rewards_GKN.shape
    ids_GR = table.response_ids_GKN.flatten(1)
    absent = torch.iinfo(torch.int64).max
    order_GR = torch.where(ids_GR < 0, absent, ids_GR).argsort(dim=1)
    rewards_GR, mask_GR = (t.flatten(1).gather(1, order_GR) for t in (scaled_GKN, table.mask_GKN))
    selected_GR = top_m_mask(rewards_GR, m, mask_GR)
    weights_GR = source_weights(rewards_GR, selected_GR, tau)
    back_GR = order_GR.argsort(dim=1)
    return weights_GR.gather(1, back_GR).reshape(shape), selected_GR.gather(1, back_GR).reshape(shape)


def pair_table(dataset: FusedDataset, objective: ObjectiveConfig, table: RewardTable) -> PairTable:
    """Pairs inside each source: argmax and argmin of the rewards, with everything dropped counted.

    Equal tokens make no pair, nor does a reward gap outside objective.min_reward_gap to max_reward_gap.
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
