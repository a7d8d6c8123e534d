"""From a micro-batch's sequence log-probabilities to its weighted loss and its metrics: what the engine is given.

Every loss is a plain sum over the items of the micro-batch, weight x loss, not yet divided; every metric a (sum,
count). Both add up over micro-batches and ranks, so nothing here may divide by what happens to lie in this micro-batch.

Shapes: N sequences, P pairs or triples, I items of the loss (N or P), K sources.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuserl_megatron.objectives import reduce
from fuserl_megatron.objectives.sft import sft_losses
from fuserl_megatron.objectives.spec import LossSpec, Unit
from fuserl_megatron.objectives.terms import Batch, preference_terms

PER_SOURCE = ("nll_per_token", "preference_loss", "accuracy", "margin", "weight_share")
"""Metrics that are also taken source by source, where a run has them."""


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """Numbers that a loss needs beside the micro-batch, the same on all ranks for one global batch."""

    alpha: float | None = None
    """WRPO: weight of the source response at this step."""
    kl: float | None = None
    """KTO: the reference point over the global batch."""


LossAndMetrics = tuple[Tensor, dict[str, reduce.SumCount]]


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a run, its options resolved."""

    metric_names: tuple[str, ...]
    """Fixed for the run, so that every rank and micro-batch reduces one tensor of one shape."""
    function: Callable[[Tensor, Batch, StepValues], LossAndMetrics]

    def __call__(self, logps_N: Tensor, batch: Batch, values: StepValues) -> LossAndMetrics:
        """Loss and metrics of one micro-batch, from log pi summed over each sequence's scored tokens, with gradient.

        Returns:
            0-d sum over the items of weight x loss, and the metrics by name.
        """
        loss, metrics = self.function(logps_N, batch, values)
        return loss, metrics | {"response_length": reduce.sum_count(batch.lengths_N)}


def sft_loss(reduction: str, sources: Sequence[str]) -> BatchLoss:
    """FuseSFT under one of the reductions of sft.py."""

    def function(logps_N: Tensor, batch: Batch, values: StepValues) -> LossAndMetrics:
        losses_N = sft_losses(logps_N, batch.lengths_N, batch.weights_N, reduction)
        nll_N, tokens_N = -logps_N.detach(), batch.lengths_N.double()
        metrics = {"nll_per_token": (nll_N.sum(), tokens_N.sum())}
        nll_K, _ = reduce.sum_count_per_source(nll_N, batch.source_ids_N, len(sources))
        tokens_K, _ = reduce.sum_count_per_source(tokens_N, batch.source_ids_N, len(sources))
        metrics |= _by_source("nll_per_token", (nll_K, tokens_K), sources)
        return losses_N.sum(), metrics | _weight_shares(batch.weights_N, batch.source_ids_N, sources)

    return BatchLoss(_with_sources(["nll_per_token", "response_length"], sources), function)


def preference_loss(spec: LossSpec, options: Mapping[str, Any], sources: Sequence[str]) -> BatchLoss:
    """FusePO with a loss and its complete options, from `LossSpec.complete`."""

    def function(logps_N: Tensor, batch: Batch, values: StepValues) -> LossAndMetrics:
        terms = preference_terms(spec, options, logps_N, batch, alpha=values.alpha, kl=values.kl)
        weights_I = batch.pair_weights_P if spec.unit.compares else batch.weights_N
        sources_I = batch.pair_source_ids_P if spec.unit.compares else batch.source_ids_N
        items = {"preference_loss": (terms.losses_I, None), **terms.metrics}
        metrics = {name: reduce.sum_count(*item) for name, item in items.items()}
        for name in PER_SOURCE:
            if name in items:
                values_I, mask_I = items[name]
                found = reduce.sum_count_per_source(values_I, sources_I, len(sources), mask_I)
                metrics |= _by_source(name, found, sources)
        shares_I = _per_prompt(weights_I, batch) if spec.unit is Unit.ALL_RESPONSES else weights_I
        metrics |= _weight_shares(shares_I, sources_I, sources)
        if batch.reference_logps_N is not None:
            metrics["kl_to_reference"] = reduce.sum_count(logps_N - batch.reference_logps_N)
        return (weights_I.to(terms.losses_I.dtype) * terms.losses_I).sum(), metrics

    names = ["preference_loss", *spec.metric_names, "response_length"]
    if spec.uses_reference(options):
        names.append("kl_to_reference")
    return BatchLoss(_with_sources(names, sources), function)


Metric = Callable[[Tensor, Any], tuple[Tensor, Tensor | None]]
"""A user's own metric: (log pi [N], batch) -> (values, mask of those that count, None for all), both [I]."""


def with_metrics(loss: BatchLoss, metrics: Mapping[str, Metric]) -> BatchLoss:
    """The loss with more metrics: the mean of each one's values over the global batch."""

    def function(logps_N: Tensor, batch: Batch, values: StepValues) -> LossAndMetrics:
        total, found = loss.function(logps_N, batch, values)
        own = {name: reduce.sum_count(*metric(logps_N.detach(), batch)) for name, metric in metrics.items()}
        return total, found | own

    return BatchLoss((*loss.metric_names, *metrics), function)


def _with_sources(names: Sequence[str], sources: Sequence[str]) -> tuple[str, ...]:
    return (*names, *(f"{n}/{s}" for n in PER_SOURCE if n in (*names, "weight_share") for s in sources))


def _weight_shares(weights_I: Tensor, sources_I: Tensor, sources: Sequence[str]) -> dict[str, reduce.SumCount]:
    """Each source's part of all weight: the weights of a prompt sum to 1, so the counts add up to the prompts."""
    sums_K, _ = reduce.sum_count_per_source(weights_I, sources_I, len(sources))
    return _by_source("weight_share", (sums_K, sums_K.sum().expand(len(sources))), sources)


def _per_prompt(weights_N: Tensor, batch: Any) -> Tensor:
    """A source's weight spread over its N responses."""
    # no bincount: on a GPU the host would wait for it
    sizes_N = torch.zeros_like(weights_N).index_add(0, batch.group_ids_N, torch.ones_like(weights_N))
    return weights_N / sizes_N[batch.group_ids_N]


def _by_source(name: str, found: tuple[Tensor, Tensor], sources: Sequence[str]) -> dict[str, reduce.SumCount]:
    return {f"{name}/{s}": (found[0][k], found[1][k]) for k, s in enumerate(sources)}
