"""From a micro-batch's sequence log-probabilities to its weighted loss and its metrics. Needs no Megatron.

Every loss is a plain sum over the items of the micro-batch, weight x loss, not yet divided; every metric a (sum,
count). Both add up over micro-batches and ranks, so nothing here may divide by what happens to lie in this micro-batch.

Shapes: N sequences, P pairs or triples, I items of the loss (N or P), K sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl_megatron.config.objective import loss_options, uses_reference
from fuserl_megatron.config.schema import ObjectiveConfig
from fuserl_megatron.data.batch import PackedBatch
from fuserl_megatron.objectives import reduce
from fuserl_megatron.objectives.dispatch import metrics_of, preference_losses
from fuserl_megatron.objectives.loss_table import LOSSES, PreferenceLoss, Unit
from fuserl_megatron.objectives.sft import sft_losses

PER_SOURCE = ("nll_per_token", "preference_loss", "accuracy", "margin", "weight_share")
"""Metrics that are also taken source by source, where a run has them."""


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """Numbers that a loss needs beside the micro-batch, the same on all ranks for one global batch."""

    alpha: float | None = None
    """WRPO: weight of the source response at this step."""
    kl: float | None = None
    """KTO: the reference point over the global batch."""


def metric_names(objective: ObjectiveConfig, sources: Sequence[str]) -> list[str]:
    """The fixed metric names of a run, so that every rank and micro-batch reduces one tensor of one shape."""
    if objective.stage == "fusesft":
        names = ["nll_per_token", "response_length"]
    else:
        names = ["preference_loss", *metrics_of(PreferenceLoss(objective.loss)), "response_length"]
        if uses_reference(objective):
            names.append("kl_to_reference")
    return names + [f"{n}/{s}" for n in PER_SOURCE if n in (*names, "weight_share") for s in sources]


def batch_loss(
    objective: ObjectiveConfig,
    logps_N: Tensor,
    batch: PackedBatch,
    sources: Sequence[str],
    values: StepValues,
) -> tuple[Tensor, dict[str, reduce.SumCount]]:
    """Loss and metrics of one micro-batch, from log pi summed over the scored tokens of each sequence, with gradient.

    Returns:
        0-d sum over the items of weight x loss, and the metrics by name (`metric_names`).
    """
    lengths = {"response_length": reduce.sum_count(batch.lengths_N)}
    if objective.stage == "fusesft":
        losses_N = sft_losses(logps_N, batch.lengths_N, batch.weights_N, objective.nll_reduction or "token_mean")
        return losses_N.sum(), _sft_metrics(logps_N, batch, sources) | lengths
    loss = PreferenceLoss(objective.loss)
    unit = LOSSES[loss].unit
    terms = preference_losses(loss, logps_N, batch, loss_options(objective), alpha=values.alpha, kl=values.kl)
    of_pairs = unit in (Unit.PAIRS, Unit.TRIPLES)
    weights_I = batch.pair_weights_P if of_pairs else batch.weights_N
    sources_I = batch.pair_source_ids_P if of_pairs else batch.source_ids_N
    items = {"preference_loss": (terms.losses_I, None), **terms.metrics}
    metrics = {name: reduce.sum_count(*item) for name, item in items.items()}
    for name in PER_SOURCE:
        if name in items:
            values_I, mask_I = items[name]
            found = reduce.sum_count_per_source(values_I, sources_I, len(sources), mask_I)
            metrics |= _by_source(name, found, sources)
    shares_I = _per_prompt(weights_I, batch) if unit is Unit.ALL_RESPONSES else weights_I
    metrics |= _weight_shares(shares_I, sources_I, sources)
    if batch.reference_logps_N is not None:
        metrics["kl_to_reference"] = reduce.sum_count(logps_N - batch.reference_logps_N)
    return (weights_I.to(terms.losses_I.dtype) * terms.losses_I).sum(), metrics | lengths


def _sft_metrics(logps_N: Tensor, batch: PackedBatch, sources: Sequence[str]) -> dict[str, reduce.SumCount]:
    nll_N, tokens_N = -logps_N.detach(), batch.lengths_N.double()
    metrics = {"nll_per_token": (nll_N.sum(), tokens_N.sum())}
    nll_K, _ = reduce.sum_count_per_source(nll_N, batch.source_ids_N, len(sources))
    tokens_K, _ = reduce.sum_count_per_source(tokens_N, batch.source_ids_N, len(sources))
    metrics |= _by_source("nll_per_token", (nll_K, tokens_K), sources)
    return metrics | _weight_shares(batch.weights_N, batch.source_ids_N, sources)


def _weight_shares(weights_I: Tensor, sources_I: Tensor, sources: Sequence[str]) -> dict[str, reduce.SumCount]:
    """Each source's part of all weight: the weights of a prompt sum to 1, so the counts add up to the prompts."""
    sums_K, _ = reduce.sum_count_per_source(weights_I, sources_I, len(sources))
    return _by_source("weight_share", (sums_K, sums_K.sum().expand(len(sources))), sources)


def _per_prompt(weights_N: Tensor, batch: PackedBatch) -> Tensor:
    """A source's weight spread over its N responses."""
    sizes_N = torch.bincount(batch.group_ids_N, minlength=batch.num_sequences)[batch.group_ids_N]
    return weights_N / sizes_N


def _by_source(name: str, found: tuple[Tensor, Tensor], sources: Sequence[str]) -> dict[str, reduce.SumCount]:
    return {f"{name}/{s}": (found[0][k], found[1][k]) for k, s in enumerate(sources)}
