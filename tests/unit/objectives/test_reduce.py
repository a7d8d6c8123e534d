"""Metrics as sums and counts: parts add up, padding is never read, names are fixed."""

import math

import pytest
import torch

from fuserl_megatron.objectives.reduce import means, stack, sum_count, sum_count_per_source

NAMES = ("loss", "accuracy", "never_seen")


def test_parts_add_up_to_the_whole_although_their_sizes_differ():
    values_P = torch.tensor([1.0, 0.0, 1.0, 1.0, float("nan")], requires_grad=True)
    mask_P = torch.tensor([True, True, True, True, False])
    parts = [
        stack({"loss": sum_count(2 * values_P[p], mask_P[p]), "accuracy": sum_count(values_P[p], mask_P[p])}, NAMES)
        for p in (slice(0, 1), slice(1, 5))
    ]
    total_M2 = parts[0] + parts[1]
    assert not total_M2.requires_grad and total_M2.dtype == torch.float64
    assert total_M2.tolist() == [[6.0, 4.0], [3.0, 4.0], [0.0, 0.0]]
    average = means(total_M2)
    assert average[:2].tolist() == [1.5, 0.75] and math.isnan(average[2].item())
    # Negative control: the mean of the parts' means is another number.
    assert sum(means(p)[1] for p in parts).item() / 2 != pytest.approx(0.75)


def test_the_order_is_that_of_the_names_whatever_the_metrics_and_their_order():
    metrics = {"accuracy": sum_count(torch.ones(3)), "loss": sum_count(torch.tensor([2.0]))}
    assert stack(metrics, NAMES).tolist() == [[2.0, 1.0], [3.0, 3.0], [0.0, 0.0]]
    assert stack({}, NAMES).shape == (3, 2) and stack({}, ()).shape == (0, 2)


def test_a_metric_without_a_name_is_refused_not_lost():
    with pytest.raises(ValueError, match="margin"):
        stack({"margin": sum_count(torch.ones(3))}, NAMES)


def test_metrics_per_source():
    values_P = torch.tensor([1.0, 2.0, 4.0, float("nan")])
    sums_K, counts_K = sum_count_per_source(
        values_P, torch.tensor([2, 0, 2, 1]), 4, torch.tensor([True, True, True, False])
    )
    assert sums_K.tolist() == [2.0, 0.0, 5.0, 0.0] and counts_K.tolist() == [1.0, 0.0, 2.0, 0.0]
