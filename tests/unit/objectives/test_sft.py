"""FuseSFT: property 1, split invariance with its negative control, padding, gradients."""

import pytest
import torch

from fuserl_megatron.objectives.sft import SftReduction, sft_losses


def batch():
    """Three prompts with 2, 3 and 1 responses, weights summing to 1 each, and a padding response."""
    logps_N = -torch.tensor([30.0, 24.0, 45.0, 10.0, 7.0, 3.0, 0.0], dtype=torch.float64)
    lengths_N = torch.tensor([15, 10, 30, 4, 9, 2, 0])
    weights_N = torch.tensor([0.3, 0.7, 0.2, 0.5, 0.3, 1.0, 0.0], dtype=torch.float64)
    return logps_N, lengths_N, weights_N


def normalizer_of(lengths_N, weights_N, num_prompts, reduction):
    return (weights_N * lengths_N).sum() if reduction == "weighted_token_mean" else num_prompts


def loss_of(logps_N, lengths_N, weights_N, num_prompts, reduction):
    total = sft_losses(logps_N, lengths_N, weights_N, reduction).sum()
    return total / normalizer_of(lengths_N, weights_N, num_prompts, reduction)


@pytest.mark.parametrize("reduction", [*SftReduction])
def test_splitting_the_batch_changes_nothing_if_the_normaliser_is_global(reduction):
    logps_N, lengths_N, weights_N = batch()
    expected = loss_of(logps_N, lengths_N, weights_N, 3, reduction)
    cut = 1  # splits the first prompt's sources over two parts
    parts = [slice(0, cut), slice(cut, None)]
    normalizer = sum(
        normalizer_of(lengths_N[p], weights_N[p], n, reduction) for p, n in zip(parts, (1, 2), strict=True)
    )
    actual = sum(sft_losses(logps_N[p], lengths_N[p], weights_N[p], reduction).sum() / normalizer for p in parts)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    # Negative control: dividing each part by its own count is another number.
    local = sum(
        loss_of(logps_N[p], lengths_N[p], weights_N[p], n, reduction) for p, n in zip(parts, (1, 2), strict=True)
    )
    assert abs((local / 2 - expected).item()) > 1e-3


@pytest.mark.parametrize("reduction", [*SftReduction])
def test_padding_adds_exactly_nothing(reduction):
    logps_N, lengths_N, weights_N = batch()
    assert sft_losses(logps_N, lengths_N, weights_N, reduction)[-1].item() == 0.0
    assert loss_of(*batch(), 3, reduction) == loss_of(logps_N[:-1], lengths_N[:-1], weights_N[:-1], 3, reduction)


def test_one_source_is_plain_sft():
    logps_N, lengths_N = -torch.tensor([30.0, 24.0]).double(), torch.tensor([15, 10])
    ones = torch.ones(2, dtype=torch.float64)
    assert loss_of(logps_N, lengths_N, ones, 2, "token_mean").item() == pytest.approx((2.0 + 2.4) / 2)
    assert loss_of(logps_N, lengths_N, ones, 2, "token_sum").item() == pytest.approx((30 + 24) / 2)
    # weighted_token_mean with equal weights is the ordinary mean over tokens, whatever the common weight.
    for weight in (1.0, 0.25):
        assert loss_of(logps_N, lengths_N, weight * ones, 2, "weighted_token_mean").item() == pytest.approx(54 / 25)


@pytest.mark.parametrize("reduction", [*SftReduction])
def test_gradcheck_and_weights_are_constants(reduction):
    logps_N, lengths_N, weights_N = batch()
    logps_N.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sft_losses(x, lengths_N, weights_N, reduction), logps_N)


def test_float32_inputs_stay_float32_with_float64_weights():
    logps_N, lengths_N, weights_N = batch()
    assert sft_losses(logps_N.float(), lengths_N, weights_N, "token_mean").dtype == torch.float32


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="mean_of_means"):
        sft_losses(*batch(), "mean_of_means")
