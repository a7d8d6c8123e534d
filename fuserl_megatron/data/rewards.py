"""Rewards of a whole data set as one tensor.

Shapes: G prompts, K sources, N the most responses that one source gave to one prompt, R responses of the data set.
"""

from dataclasses import dataclass

import numpy as np
import torch

from fuserl_megatron.objectives.weights import source_scores, standardize


@dataclass(frozen=True)
class RewardTable:
    """Rewards of a data set as [G, K, N] tensors."""

    rewards_GKN: torch.Tensor
    """float64, raw; 0 where there is no response."""
    mask_GKN: torch.Tensor
    """bool, True where a response exists."""
    response_ids_GKN: torch.Tensor
    """int64; -1 where there is no response."""

    def scaled(self, standardization: str) -> torch.Tensor:
        """[G, K, N] rewards after the standardisation named ("none", "prompt", "dataset")."""
        if standardization == "none":
            return self.rewards_GKN
        return standardize(self.rewards_GKN, self.mask_GKN, over=standardization)

    def flat(self, keep_GKN: torch.Tensor, *values_GKN: torch.Tensor) -> list[np.ndarray]:
        """[N] response ids kept, ascending (so prompt by prompt), and the entry of each of the values there."""
        keep = keep_GKN.numpy()
        order_N = np.argsort(self.response_ids_GKN.numpy()[keep])
        return [part_GKN.numpy()[keep][order_N] for part_GKN in (self.response_ids_GKN, *values_GKN)]

    def scores(self, standardization: str, aggregation: str) -> torch.Tensor:
        """[G, K] source scores, -inf where a source gave no response."""
        return source_scores(self.scaled(standardization), self.mask_GKN, aggregation)


def reward_table(
    response_offsets: np.ndarray, source_ids: np.ndarray, rewards: np.ndarray, num_sources: int
) -> RewardTable:
    """Lay rewards out by prompt, source and order of appearance.

    Args:
        response_offsets: [G + 1] first response of each prompt.
        source_ids: [R] source of each response.
        rewards: [R] finite rewards.
        num_sources: K.
    """
    num_groups = response_offsets.size - 1
    group_of_R = np.repeat(np.arange(num_groups), np.diff(response_offsets))
    key_R = group_of_R * num_sources + source_ids
    order_R = np.argsort(key_R, kind="stable")
    sorted_key_R = key_R[order_R]
    starts = np.flatnonzero(np.diff(sorted_key_R, prepend=-1))
    run_lengths = np.diff(starts, append=sorted_key_R.size)
    within_R = np.arange(sorted_key_R.size) - np.repeat(starts, run_lengths)
    shape = (num_groups, num_sources, int(run_lengths.max(initial=1)))
    ids_GKN = np.full(shape, -1, dtype=np.int64)
    ids_GKN.reshape(-1)[sorted_key_R * shape[2] + within_R] = order_R
    mask_GKN = ids_GKN >= 0
    rewards_GKN = np.where(mask_GKN, rewards[ids_GKN], 0.0)
    return RewardTable(torch.from_numpy(rewards_GKN), torch.from_numpy(mask_GKN), torch.from_numpy(ids_GKN))
