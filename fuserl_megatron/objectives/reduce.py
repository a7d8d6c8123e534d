"""Metrics as (sum, count) pairs, stacked in one tensor so that one all-reduce carries them all.

A metric is never averaged locally: each part of a batch gives a sum and a count, the parts are added (over
micro-batches, then over ranks in one collective), and only then is sum / count formed. Nothing here leaves the device;
the caller moves the final tensor to the host once.

Shapes: M metrics, P items (pairs or responses), K sources.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SumCount = tuple[Tensor, Tensor]


def sum_count(values_P: Tensor, mask_P: Tensor | None = None) -> SumCount:
    """Sum of the values inside the mask, and how many there are.

    Args:
        values_P: [P] values; entries outside the mask are never read and may be NaN.
        mask_P: [P] bool, False for padding; None for all.

    Returns:
        Two 0-d float64 tensors, detached.
    """
    values_P = values_P.detach().double()
    if mask_P is None:
        mask_P = torch.ones_like(values_P, dtype=torch.bool)
    return torch.where(mask_P, values_P, 0.0).sum(), mask_P.sum().double()


def sum_count_per_source(
    values_P: Tensor, source_ids_P: Tensor, num_sources: int, mask_P: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`sum_count` for each source: sums [K] and counts [K].

    Ids of sources are int64 in 0..num_sources-1, any valid one for padding.
    """
    values_P = values_P.detach().double()
    if mask_P is None:
        mask_P = torch.ones_like(values_P, dtype=torch.bool)
    zeros_K = values_P.new_zeros(num_sources)
    sums_K = zeros_K.index_add(0, source_ids_P, torch.where(mask_P, values_P, 0.0))
    return sums_K, zeros_K.index_add(0, source_ids_P, mask_P.double())


def stack(metrics: Mapping[str, SumCount], names: Sequence[str]) -> Tensor:
    """Lay the metrics out in one tensor, in the order of `names`.

    The names are fixed by the caller for the whole run, so that every rank and micro-batch has the same shape; a metric
    that a part lacks contributes (0, 0).

    Args:
        metrics: name -> (sum, count), 0-d tensors on one device.
        names: the M fixed names.

    Returns:
        [M, 2] float64: column 0 sums, column 1 counts. Add such tensors to combine parts.

    Raises:
        ValueError: a metric is not among the names (it would be lost).
    """
    unknown = sorted(set(metrics) - set(names))
    if unknown:
        raise ValueError(f"metrics {unknown} are not among the fixed names {list(names)}: add them there")
    device = next((total.device for total, _ in metrics.values()), None)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    rows = [torch.stack([part.detach().double() for part in metrics.get(name, (zero, zero))]) for name in names]
    return torch.stack(rows) if rows else zero.new_zeros(0, 2)


def means(stacked_M2: Tensor) -> Tensor:
    """[M] means, sum / count of each metric; NaN where nothing was counted (a mean of nothing is not 0)."""
    sums_M, counts_M = stacked_M2.unbind(dim=1)
    return torch.where(counts_M > 0, sums_M / counts_M.masked_fill(counts_M == 0, 1.0), torch.nan)
