"""InfiFPO's fused reference, by hand, and its limits."""

import pytest
import torch

from fuserl_megatron.objectives.infifpo import fused_reference, infifpo
from fuserl_megatron.objectives.preference import ln_dpo

NAN = float("nan")


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_fused_reference_by_hand():
    sources_PK = column(-1.0, -2.5, -0.4).reshape(1, 3)
    present_PK = torch.tensor([[True, True, True]])
    initial_P = column(-2.0)

    def fused(chosen, fusion):
        return fused_reference(sources_PK, present_PK, initial_P, chosen=chosen, fusion=fusion).item()

    # Chosen: clipped from below by the initial target: (-1, -2, -0.4). Rejected: from above: (-2, -2.5, -2).
    assert fused(True, "max_margin") == -0.4
    assert fused(False, "max_margin") == -2.5
    assert fused(True, "mean") == pytest.approx(-3.4 / 3)
    assert fused(False, "mean") == pytest.approx(-6.5 / 3)
    clipped = column(-1.0, -2.0, -0.4)
    assert fused(True, "confidence") == pytest.approx((clipped.softmax(0) * clipped).sum().item())
    with pytest.raises(ValueError, match="median"):
        fused(True, "median")


@pytest.mark.parametrize("fusion", ["max_margin", "mean", "confidence"])
@pytest.mark.parametrize("chosen", [True, False])
def test_absent_sources_are_never_read(fusion, chosen):
    initial_P = column(-2.0, -2.0)
    with_hole = fused_reference(
        torch.tensor([[-1.0, NAN, -3.0], [NAN, NAN, NAN]], dtype=torch.float64),
        torch.tensor([[True, False, True], [False, False, False]]),
        initial_P,
        chosen=chosen,
        fusion=fusion,
    )
    without = fused_reference(
        column(-1.0, -3.0).reshape(1, 2),
        torch.ones(1, 2, dtype=torch.bool),
        initial_P[:1],
        chosen=chosen,
        fusion=fusion,
    )
    assert with_hole[0].item() == pytest.approx(without.item(), abs=1e-12)
    assert with_hole[1].item() == -2.0


@pytest.mark.parametrize("fusion", ["max_margin", "mean", "confidence"])
def test_without_sources_it_is_length_normalised_dpo(fusion):
    policy, reference = (column(-12.5), column(-20.25)), (column(-13.0), column(-18.75))
    lengths = (torch.tensor([5]), torch.tensor([8]))
    nothing = torch.full((1, 2), NAN, dtype=torch.float64)
    absent = torch.zeros(1, 2, dtype=torch.bool)
    actual = infifpo(policy, reference, lengths, (nothing, nothing), absent, beta=10.0, fusion=fusion)
    expected = ln_dpo(policy, reference, lengths, beta=10.0)
    torch.testing.assert_close(actual.losses_P, expected.losses_P, atol=1e-12, rtol=0)
    # A source that prefers the chosen response raises the bar: the loss grows.
    source, present = (column(-0.5)[None], column(-4.0)[None]), torch.ones(1, 1, dtype=torch.bool)
    prefers = infifpo(policy, reference, lengths, source, present, beta=10.0, fusion=fusion)
    assert prefers.losses_P > actual.losses_P
