"""The golden values of docs/math.md, in float64, to 1e-12."""

import pytest
import torch

from fuserl_megatron.objectives import group_losses, preference, weights
from fuserl_megatron.objectives.sft import sft_losses

TOLERANCE = 1e-12


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


POLICY = (column(-12.5), column(-20.25))
REFERENCE = (column(-13.0), column(-18.75))
LENGTHS = (torch.tensor([5]), torch.tensor([8]))


def test_one_pair_has_the_published_values():
    golden = {
        "dpo 0.1": (preference.dpo(POLICY, REFERENCE, beta=0.1), 0.5981388693815918),
        "dpo 0.01": (preference.dpo(POLICY, REFERENCE, beta=0.01), 0.6831971797266342),
        "cdpo": (preference.cdpo(POLICY, REFERENCE, beta=0.1, label_smoothing=0.1), 0.6181388693815918),
        "robust": (preference.robust(POLICY, REFERENCE, beta=0.1, label_smoothing=0.1), 0.5731388693815918),
        "ipo mean": (preference.ipo(POLICY, REFERENCE, LENGTHS, beta=0.1, length_normalized=True), 22.20765625),
        "ipo sum": (preference.ipo(POLICY, REFERENCE, LENGTHS, beta=0.1, length_normalized=False), 9.0),
        "ln_dpo": (preference.ln_dpo(POLICY, REFERENCE, LENGTHS, beta=10.0), 0.05488217915807815),
        "simpo 10": (preference.simpo(POLICY, LENGTHS, beta=10.0, gamma=3.0), 2.753335355532678),
        "simpo 2.5": (preference.simpo(POLICY, LENGTHS, beta=2.5, gamma=2.5 * 0.55), 1.5385535417696805),
        "orpo": (preference.orpo(POLICY, LENGTHS, beta=0.1), 2.567629287527701),
    }
    for name, (result, expected) in golden.items():
        assert result.losses_P.item() == pytest.approx(expected, abs=TOLERANCE), name


def test_dpo_gradient_on_the_chosen_log_probability():
    chosen = column(-12.5).requires_grad_()
    preference.dpo((chosen, POLICY[1]), REFERENCE, beta=0.1).losses_P.sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.04501660026875221, abs=TOLERANCE)


def test_neighbour_losses_follow_their_equations_by_hand():
    delta = 0.5 - (-1.5)  # h+ - h-
    hinge = preference.hinge(POLICY, REFERENCE, beta=0.1)
    assert hinge.losses_P.item() == pytest.approx(1 - 0.1 * delta, abs=TOLERANCE)
    assert preference.hinge(POLICY, REFERENCE, beta=0.6).losses_P.item() == 0.0
    # MaPPO with dr = 0.25: softplus(-(0.1 * 0.5 + 0.25 * 0.1 * 1.5))
    mappo = preference.mappo(POLICY, REFERENCE, column(0.25), beta=0.1)
    assert mappo.losses_P.item() == pytest.approx(torch.nn.functional.softplus(column(-0.0875)).item(), abs=TOLERANCE)
    # CPO: softplus(-0.1 * 7.75) + 1 * 12.5 / 5
    cpo = preference.cpo(POLICY, LENGTHS, beta=0.1, cpo_alpha=1.0)
    assert cpo.losses_P.item() == pytest.approx(
        torch.nn.functional.softplus(column(-0.775)).item() + 2.5, abs=TOLERANCE
    )
    assert preference.sft_term(POLICY[0], LENGTHS[0], rpo_alpha=0.5).item() == pytest.approx(1.25, abs=TOLERANCE)


def test_implicit_rewards_margin_and_accuracy():
    result = preference.dpo(POLICY, REFERENCE, beta=0.1)
    assert result.chosen_implicit_rewards_P.item() == pytest.approx(0.05, abs=TOLERANCE)
    assert result.rejected_implicit_rewards_P.item() == pytest.approx(-0.15, abs=TOLERANCE)
    assert result.margins_P.item() == pytest.approx(0.2, abs=TOLERANCE)
    assert result.accuracies_P.item() == 1.0
    at_start = preference.dpo(POLICY, POLICY, beta=0.1)
    assert at_start.accuracies_P.item() == 0.0


def test_source_weights_of_four_scores():
    scores_K = column(0.18, 0.165, 0.172, 0.151)
    for tau, expected in ((1.0, (0.2533, 0.2495, 0.2512, 0.2460)), (0.01, (0.5789, 0.1292, 0.2601, 0.0319))):
        actual = weights.source_weights(scores_K, None, tau)
        torch.testing.assert_close(actual, column(*expected), atol=5e-5, rtol=0)
        assert actual.sum().item() == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", 1.937538691306637),
        ("token_sum", 32.48957050928783),
        ("weighted_token_mean", 1.8145123493377155),
    ],
)
def test_sft_reductions(reduction, expected):
    weights_N = weights.source_weights(column(0.18, 0.165, 0.172, 0.151), None, 0.01)
    logps_N, lengths_N = -column(30, 24, 45, 10), torch.tensor([15, 10, 30, 4])
    losses_N = sft_losses(logps_N, lengths_N, weights_N, reduction)
    normalizer = (weights_N * lengths_N).sum() if reduction == "weighted_token_mean" else 1  # prompts
    actual = losses_N.sum() / normalizer
    assert actual.item() == pytest.approx(expected, abs=TOLERANCE)


def test_rloo_advantages():
    actual = weights.rloo_advantages(column(0.12, 0.15, 0.10, 0.17, 0.14))
    torch.testing.assert_close(actual, column(-0.02, 0.0175, -0.045, 0.0425, 0.005), atol=TOLERANCE, rtol=0)


def test_fusepo_over_three_sources():
    weights_P = weights.source_weights(column(0.18, 0.165, 0.172), None, 0.01)
    zero = torch.zeros(3, dtype=torch.float64)
    losses_P = preference.dpo((column(2, -1, 0.5), zero), (zero, zero), beta=0.1).losses_P
    assert (weights_P * losses_P).sum().item() == pytest.approx(0.6365444040500433, abs=TOLERANCE)
    # The weight stands outside the sigmoid: inside it, the number is another one.
    inside = -torch.nn.functional.logsigmoid(0.1 * (weights_P * column(2, -1, 0.5)).sum())
    assert abs(inside.item() - 0.6365444040500433) > 1e-3


def test_wrpo_at_both_ends_of_alpha():
    zero = column(0.0)
    for alpha, expected in ((0.0, 0.6782596763414485), (0.1, 0.6772751750989848)):
        result = group_losses.wrpo((column(1.0), column(-2.0)), (zero, zero), column(3.0), zero, beta=0.01, alpha=alpha)
        assert result.losses_P.item() == pytest.approx(expected, abs=TOLERANCE)
    assert [group_losses.wrpo_alpha(t, 10, 0.1) for t in (0, 5, 10, 99)] == pytest.approx([0.0, 0.05, 0.1, 0.1])
