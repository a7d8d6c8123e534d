"""RLOO, KTO and WRPO: gradients, degenerate groups, relations to their definitions."""

import math

import pytest
import torch
from loss_cases import random_batch

from fuserl_megatron.objectives.group_losses import kto, kto_kl, rloo, wrpo_alpha
from fuserl_megatron.objectives.weights import rloo_advantages


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def groups():
    """Three groups: sizes 3, 1 and 2."""
    ids_N = torch.tensor([0, 1, 0, 2, 0, 2])
    rewards_N = column(0.1, 0.9, 0.3, 0.5, 0.2, 0.4)
    advantages_N = torch.zeros(6, dtype=torch.float64)
    for group in range(3):
        advantages_N[ids_N == group] = rloo_advantages(rewards_N[ids_N == group])
    logps_N = column(-3.0, -2.0, -7.0, -4.0, -5.0, -6.0)
    reference_N = column(-2.0, -2.5, -8.0, -4.5, -3.0, -6.5)
    return ids_N, rewards_N, advantages_N, logps_N, reference_N


def test_rloo_is_the_mean_over_each_group_of_minus_advantage_times_logp():
    ids_N, _, advantages_N, logps_N, _ = groups()
    losses_N = rloo(logps_N, advantages_N, ids_N, 3)
    for group in range(3):
        inside = ids_N == group
        expected = -(advantages_N[inside] * logps_N[inside]).mean()
        assert losses_N[inside].sum().item() == pytest.approx(expected.item(), abs=1e-12)
    assert losses_N[1].item() == 0.0  # a lone response teaches nothing, and is not 0 / 0


def test_rloo_gradcheck_with_and_without_kl():
    ids_N, _, advantages_N, logps_N, reference_N = groups()
    logps_N.requires_grad_()
    for kl_coef in (0.0, 0.3):
        assert torch.autograd.gradcheck(
            lambda x, c=kl_coef: rloo(x, advantages_N, ids_N, 3, reference_logps_N=reference_N, kl_coef=c), logps_N
        )


def test_rloo_kl_has_the_gradient_of_kl_inside_the_reward():
    """R_n = r_n - c h_n with h_n a constant, leave-one-out advantages of R: the definition others use online."""
    ids_N, rewards_N, advantages_N, logps_N, reference_N = groups()
    kl_coef = 0.3
    logps_N.requires_grad_()
    (actual,) = torch.autograd.grad(
        rloo(logps_N, advantages_N, ids_N, 3, reference_logps_N=reference_N, kl_coef=kl_coef).sum(), logps_N
    )
    shaped_N = rewards_N - kl_coef * (logps_N.detach() - reference_N)
    expected = torch.zeros(6, dtype=torch.float64)
    for group in range(3):
        inside = ids_N == group
        expected[inside] = -rloo_advantages(shaped_N[inside]) / inside.sum()
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    # Without the KL it is another gradient.
    (plain,) = torch.autograd.grad(rloo(logps_N, advantages_N, ids_N, 3).sum(), logps_N)
    assert (plain - actual).abs().max() > 1e-2


def test_rloo_kl_is_stationary_at_the_regularised_optimum():
    ids_N, rewards_N, advantages_N, _, reference_N = groups()
    kl_coef = 0.3
    optimum_N = (reference_N + rewards_N / kl_coef + column(5.0, -1.0, 2.0)[ids_N]).requires_grad_()
    loss = rloo(optimum_N, advantages_N, ids_N, 3, reference_logps_N=reference_N, kl_coef=kl_coef).sum()
    (gradient,) = torch.autograd.grad(loss, optimum_N)
    assert gradient.abs().max() < 1e-12


def test_rloo_kl_without_a_reference_is_refused():
    ids_N, _, advantages_N, logps_N, _ = groups()
    with pytest.raises(ValueError, match="reference"):
        rloo(logps_N, advantages_N, ids_N, 3, kl_coef=0.1)


def test_rloo_of_equal_rewards_has_zero_loss_and_gradient():
    logps_N = column(-3.0, -5.0, -9.0).requires_grad_()
    loss = rloo(logps_N, rloo_advantages(column(0.1, 0.1, 0.1)), torch.zeros(3, dtype=torch.int64), 1).sum()
    loss.backward()
    assert loss.item() == 0.0 and logps_N.grad.tolist() == [0.0, 0.0, 0.0]


def test_kto_by_hand_and_against_its_equation():
    policy_N, reference_N = column(-3.0, -5.0), column(-4.0, -4.5)
    losses_N = kto(
        policy_N, reference_N, torch.tensor([True, False]), 0.2, beta=0.5, desirable_weight=1.5, undesirable_weight=0.7
    )
    good = 1.5 * (1 - 1 / (1 + math.exp(-0.5 * (1.0 - 0.2))))
    bad = 0.7 * (1 - 1 / (1 + math.exp(-0.5 * (0.2 - -0.5))))
    assert losses_N.tolist() == pytest.approx([good, bad], abs=1e-12)
    assert kto(policy_N, policy_N, torch.tensor([True, False]), 0.0, beta=0.5).tolist() == [0.5, 0.5]


def test_kto_gradcheck_extremes_and_detached_kl():
    batch = random_batch()
    policy_N, reference_N = batch["policy"][0].requires_grad_(), batch["reference"][0]
    kl = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kto(x, reference_N, batch["desirable"], kl.detach(), beta=0.1), policy_N)
    kto(policy_N, reference_N, batch["desirable"], kl, beta=0.1).sum().backward()
    assert kl.grad is None
    for value in (-1e5, 0.0):
        far_N = torch.full((2,), value, requires_grad=True)
        other_N = torch.full((2,), -1e5 - value)
        losses_N = kto(far_N, other_N, torch.tensor([True, False]), 0.0, beta=0.1)
        losses_N.sum().backward()
        assert sorted(losses_N.tolist()) == [0.0, 1.0] and far_N.grad.isfinite().all()


def test_kto_reference_point_is_a_mean_clamped_at_zero():
    policy_N, reference_N = column(-3.0, -5.0).requires_grad_(), column(-4.0, -7.0)
    kl = kto_kl(policy_N, reference_N)
    assert kl.item() == pytest.approx(1.5) and not kl.requires_grad
    assert kto_kl(reference_N, policy_N).item() == 0.0
    assert kto_kl(torch.zeros(0), torch.zeros(0)).item() == 0.0


def test_wrpo_alpha_needs_a_run_to_rise_over():
    assert wrpo_alpha(0, 1, 0.1) == 0.0
    with pytest.raises(ValueError, match="total_steps"):
        wrpo_alpha(0, 0, 0.1)
