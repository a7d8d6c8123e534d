"""Figures of a data set: lengths, rewards, gaps, weights against tau, overlap of sources, what fits which row."""

from typing import Any

import numpy as np
import torch

from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.rewards import reward_table
from fuserl_megatron.objectives.weights import effective_number_of_sources, source_weights

QUANTILES = (0.05, 0.5, 0.95, 1.0)
ROW_LENGTHS = tuple(2**n for n in range(6, 18))
"""Up to the first that holds every prompt with all its responses."""


def statistics(dataset: FusedDataset) -> dict[str, Any]:
    """Everything, as plain numbers for JSON.

    Returns:
        lengths: of prompts, responses and both, in tokens, by quantile.
        fits: row length -> shares of prompts whose longest response, longest pair of one source, and whole group (all
            responses, the prompt once) fit.
        rewards: per source mean, deviation, and the mean deviation within a prompt.
        gaps: best minus worst reward of a source to one prompt, by quantile; and the share of ties.
        weights: tau -> mean effective number of sources and the mean weight of each.
        overlap: share of the prompts that so many sources answered.
        repeated: responses that are the same tokens as another to the same prompt.
    """
    table = reward_table(dataset.response_offsets, dataset.source_ids, dataset.rewards, len(dataset.sources))
    groups_R = np.repeat(np.arange(dataset.num_groups), np.diff(dataset.response_offsets))
    whole_R = dataset.prompt_lengths[groups_R] + dataset.response_lengths
    return {
        "prompts": dataset.num_groups,
        "responses": dataset.num_responses,
        "lengths": {
            "prompt": _quantiles(dataset.prompt_lengths),
            "response": _quantiles(dataset.response_lengths),
            "prompt + response": _quantiles(whole_R),
        },
        "fits": _fits(dataset, groups_R),
        "rewards": _rewards(dataset, groups_R),
        "gaps": _gaps(table.rewards_GKN.numpy(), table.mask_GKN.numpy()),
        "weights": _weights(dataset, table),
        "overlap": _overlap(table.mask_GKN.any(dim=2).sum(dim=1).numpy()),
        "repeated": _repeated(dataset),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    found = np.quantile(values, QUANTILES) if values.size else np.zeros(len(QUANTILES))
    names = ("p05", "median", "p95", "max")
    return {"mean": float(values.mean()) if values.size else 0.0} | dict(zip(names, map(float, found), strict=True))


def _fits(dataset: FusedDataset, groups_R: np.ndarray) -> dict[str, dict[str, float]]:
    num, prompts_G = dataset.num_groups, dataset.prompt_lengths
    longest_G, whole_G = np.zeros(num, np.int64), np.zeros(num, np.int64)
    np.maximum.at(longest_G, groups_R, dataset.response_lengths)
    np.add.at(whole_G, groups_R, dataset.response_lengths)
    # the two longest of one source: no pair of it is longer
    keys_R = groups_R * len(dataset.sources) + dataset.source_ids
    order_R = np.lexsort((-dataset.response_lengths, keys_R))
    starts = np.flatnonzero(np.diff(keys_R[order_R], prepend=-1))
    rank_R = np.arange(order_R.size) - np.repeat(starts, np.diff(starts, append=order_R.size))
    top_two = order_R[rank_R < 2]
    pair_of_key = np.bincount(keys_R[top_two], dataset.response_lengths[top_two])
    pair_G = np.zeros(num, np.int64)
    np.maximum.at(pair_G, np.arange(pair_of_key.size) // len(dataset.sources), pair_of_key.astype(np.int64))
    sizes = {"response": prompts_G + longest_G, "pair": prompts_G + pair_G, "group": prompts_G + whole_G}
    found = {}
    for length in ROW_LENGTHS:
        shares = {name: float((size_G <= length).mean()) for name, size_G in sizes.items()}
        if shares["response"] > 0:
            found[str(length)] = shares
        if shares["group"] == 1:
            break
    return found


def _rewards(dataset: FusedDataset, groups_R: np.ndarray) -> dict[str, dict[str, float]]:
    found = {}
    for k, name in enumerate(dataset.sources):
        mine = dataset.source_ids == k
        rewards, groups = dataset.rewards[mine], groups_R[mine]
        counts = np.bincount(groups, minlength=dataset.num_groups)
        several = counts > 1
        sums = np.bincount(groups, rewards, dataset.num_groups)
        means = sums / np.maximum(counts, 1)
        squares = np.bincount(groups, (rewards - means[groups]) ** 2, dataset.num_groups)
        within = np.sqrt(squares[several] / (counts[several] - 1))
        found[name] = {
            "responses": int(mine.sum()),
            "prompts": int((counts > 0).sum()),
            "mean": float(rewards.mean()) if rewards.size else 0.0,
            "deviation": float(rewards.std()) if rewards.size else 0.0,
            "within_prompt": float(within.mean()) if within.size else 0.0,
        }
    return found


def _gaps(rewards_GKN: np.ndarray, mask_GKN: np.ndarray) -> dict[str, float]:
    several_GK = mask_GKN.sum(axis=2) > 1
    best_GK = np.where(mask_GKN, rewards_GKN, -np.inf).max(axis=2)
    worst_GK = np.where(mask_GKN, rewards_GKN, np.inf).min(axis=2)
    gaps = (best_GK - worst_GK)[several_GK]
    return _quantiles(gaps) | {"ties": float((gaps == 0).mean()) if gaps.size else 0.0, "sources": int(gaps.size)}


def _weights(dataset: FusedDataset, table: Any) -> dict[str, dict[str, float]]:
    """Around the data set's own tau: a tenth to ten times."""
    manifest = dataset.manifest
    scores_GK = table.scores(manifest.reward_standardization, manifest.score_aggregation)
    found, own = {}, manifest.reward_temperature
    scale = own if 0 < own < np.inf else float(torch.where(scores_GK.isfinite(), scores_GK, 0).std()) or 1.0
    for factor in (0.1, 0.3, 1, 3, 10):
        weights_GK = source_weights(scores_GK, None, scale * factor)
        effective = effective_number_of_sources(weights_GK).mean()
        shares = dict(zip(dataset.sources, weights_GK.mean(dim=0).tolist(), strict=True))
        found[f"{scale * factor:g}"] = {"effective_number_of_sources": float(effective)} | shares
    return found


def _overlap(sources_G: np.ndarray) -> dict[str, float]:
    return {str(n): float((sources_G == n).mean()) for n in np.unique(sources_G)}


def _repeated(dataset: FusedDataset) -> int:
    count = 0
    for i in range(dataset.num_groups):
        ids = range(int(dataset.response_offsets[i]), int(dataset.response_offsets[i + 1]))
        count += len(ids) - len({dataset.response(i, r).tobytes() for r in ids})
    return count


def tables(found: dict[str, Any]) -> dict[str, list[list[str]]]:
    """The figures as tables of text, by title; the first row is the head."""
    head = f"{found['prompts']:,} prompts, {found['responses']:,} responses ({found['repeated']:,} repeated)"
    return {
        f"{head}; lengths in tokens": [
            ["", "mean", "p05", "median", "p95", "max"],
            *([name, *(f"{value:,.0f}" for value in row.values())] for name, row in found["lengths"].items()),
        ],
        "prompts that fit a row of so many tokens (longest response, longest pair of a source, all responses)": [
            ["row", "response", "pair", "group"],
            *([name, *(f"{value:.1%}" for value in row.values())] for name, row in found["fits"].items()),
        ],
        "rewards": [
            ["source", "prompts", "responses", "mean", "deviation", "within a prompt"],
            *(
                [name, f"{r['prompts']:,}", f"{r['responses']:,}"]
                + [f"{r[key]:.4g}" for key in ("mean", "deviation", "within_prompt")]
                for name, r in found["rewards"].items()
            ),
        ],
        f"best minus worst reward of a source to a prompt ({found['gaps']['ties']:.1%} are ties, which make no pair)": [
            ["", "mean", "p05", "median", "p95", "max"],
            ["gap", *(f"{found['gaps'][key]:.4g}" for key in ("mean", "p05", "median", "p95", "max"))],
        ],
        "source weights by reward_temperature": [
            ["tau", "sources in effect", *found["rewards"]],
            *([tau, *(f"{value:.3f}" for value in row.values())] for tau, row in found["weights"].items()),
        ],
        "prompts by the number of sources that answered": [
            ["sources", "share"],
            *([n, f"{share:.1%}"] for n, share in found["overlap"].items()),
        ],
    }
