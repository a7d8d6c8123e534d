"""Properties of every pair loss: gradients, extremes, and properties 1, 2, 5, 6, 9 and 10 (splits) of docs/math.md."""

import math

import pytest
import torch
from loss_cases import PAIR_NAMES, K, P, pair_losses, random_batch

from fuserl_megatron.objectives import preference
from fuserl_megatron.objectives.weights import source_weights

# No reference, or one fused from the sources: the first loss depends on the data.
NO_ANALYTIC_START = {"simpo", "cpo", "orpo", "infifpo_max_margin", "infifpo_mean", "infifpo_confidence"}
STARTS = {
    "hinge": 1.0,
    "ipo_mean": 25.0,
    "ipo_sum": 25.0,
    "exo": -math.log(2.0) - 0.5 * math.log(0.001 * 0.999),
    "discopop": 0.5 * math.log(2.0) + 0.5,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "nca": 2.0 * math.log(2.0),
    "bco": 2.0 * math.log(2.0),
    "sppo": 5000.0,
    "mpo": 1.2 * math.log(2.0),
}
"""The others of the DPO family start from log 2."""


def inputs_of(batch):
    return [*batch["policy"][:2], *batch["reference"][:2]]


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_gradcheck(name):
    batch = random_batch()
    loss = pair_losses(batch)[name]
    chosen, rejected, *reference = inputs_of(batch)
    chosen.requires_grad_()
    rejected.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: loss(c, r, *reference).losses_P, (chosen, rejected))


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_losses_are_unreduced_and_pairs_do_not_mix(name):
    batch = random_batch()
    result = pair_losses(batch)[name](*inputs_of(batch))
    assert result.losses_P.shape == (P,)
    changed = inputs_of(batch)
    changed[0] = changed[0].clone()
    changed[0][2] += 1.0
    difference = (pair_losses(batch)[name](*changed).losses_P - result.losses_P).abs() > 0
    assert difference.tolist() == [n == 2 for n in range(P)]
    assert not result.chosen_implicit_rewards_P.requires_grad


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_the_loss_falls_when_the_chosen_response_gets_likelier(name):
    batch = random_batch()
    chosen, rejected, *reference = inputs_of(batch)
    chosen.requires_grad_()
    rejected.requires_grad_()
    pair_losses(batch)[name](chosen, rejected, *reference).losses_P.sum().backward()
    if name.startswith("ipo"):  # IPO pushes towards a finite margin, from either side
        assert (chosen.grad * rejected.grad < 0).all()
    elif name == "apo_down":  # lowers both, the rejected response further: the chosen one's slope has either sign
        assert (rejected.grad > 0).all() and (chosen.grad < 0).any() and (chosen.grad > 0).any()
    elif name == "discopop":  # rises around 0, here only where the margin is small
        rising = (pair_losses(batch)[name](*inputs_of(batch)).margins_P + 0.023).abs() < 0.095
        assert ((chosen.grad > 0) == rising).all() and ((rejected.grad < 0) == rising).all()
    elif name == "hinge":  # flat once the margin is reached
        satisfied = pair_losses(batch)[name](*inputs_of(batch)).margins_P >= 1
        assert 0 < satisfied.sum() < P
        assert ((chosen.grad < 0) == ~satisfied).all() and ((rejected.grad > 0) == ~satisfied).all()
    else:
        assert (chosen.grad < 0).all() and (rejected.grad > 0).all()


@pytest.mark.parametrize("name", [n for n in PAIR_NAMES if n not in NO_ANALYTIC_START])
def test_policy_equal_to_reference_gives_the_analytic_value(name):
    batch = random_batch()
    batch["policy"][2] = batch["reference"][2]
    losses_P = pair_losses(batch)[name](*batch["reference"][:2], *batch["reference"][:2]).losses_P
    expected = STARTS.get(name, math.log(2.0))
    torch.testing.assert_close(losses_P, torch.full_like(losses_P, expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", PAIR_NAMES)
def test_a_scaled_margin_of_ten_thousand_stays_finite(name, sign, dtype):
    """|beta * delta| = 1e4 or more for every loss, with finite gradients."""
    batch = random_batch(dtype)
    size = 1e4 / 0.1 * batch["lengths"][0].max()
    chosen, rejected, *reference = inputs_of(batch)
    # Log-probabilities stay <= 0: the losing side takes the whole margin.
    low = torch.full_like(chosen, -float(size))
    chosen, rejected = (low, rejected) if sign < 0 else (chosen, low)
    chosen.requires_grad_()
    rejected.requires_grad_()
    result = pair_losses(batch)[name](chosen, rejected, *reference)
    result.losses_P.sum().backward()
    assert result.margins_P.abs().min() >= 0.9e4  # wrpo takes 1 - alpha = 0.9 of one side
    for tensor in (result.losses_P, chosen.grad, rejected.grad):
        assert tensor.isfinite().all()
        assert tensor.dtype == dtype


def test_the_textbook_form_would_not_stay_finite():
    """Negative control for the test above."""
    delta = torch.tensor(-1e5, requires_grad=True)
    loss = -torch.log(torch.sigmoid(0.1 * delta))
    loss.backward()
    assert not loss.isfinite() and not delta.grad.isfinite()
    certain = torch.zeros(1, requires_grad=True)  # a probability of exactly 1 in ORPO's odds
    odds = torch.log(1 - torch.exp(certain))
    assert odds.item() == -math.inf


def test_orpo_survives_a_probability_that_rounded_to_one():
    chosen = torch.zeros(1, requires_grad=True)
    rejected = torch.zeros(1, requires_grad=True)
    length = torch.tensor([4])
    losses_P = preference.orpo((chosen, rejected), (length, length), beta=0.1).losses_P
    losses_P.sum().backward()
    assert losses_P.isfinite().all() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


def test_padding_pairs_of_length_zero_are_finite_everywhere():
    batch = random_batch()
    zero_P = torch.zeros(P, dtype=torch.float64)
    batch["lengths"] = [torch.zeros(P, dtype=torch.int64)] * 2
    for name, loss in pair_losses(batch).items():
        chosen = zero_P.clone().requires_grad_()
        losses_P = loss(chosen, zero_P, zero_P, zero_P).losses_P
        (0.0 * losses_P).sum().backward()
        assert losses_P.isfinite().all() and (chosen.grad == 0).all(), name


def test_known_relations_between_the_losses():
    batch = random_batch()
    policy, reference = x = inputs_of(batch)[:2], inputs_of(batch)[2:]
    ones = torch.ones(P, dtype=torch.int64)
    dpo = preference.dpo(*x, beta=0.1).losses_P

    def same(result):
        torch.testing.assert_close(result.losses_P, dpo, atol=1e-12, rtol=0)

    same(preference.ln_dpo(*x, (ones, ones), beta=0.1))
    same(preference.cdpo(*x, beta=0.1, label_smoothing=0.0))
    same(preference.robust(*x, beta=0.1, label_smoothing=0.0))
    same(preference.mappo(*x, torch.ones(P, dtype=torch.float64), beta=0.1))
    # SimPO without margin is LN-DPO against a reference of constant token probability.
    lengths = batch["lengths"]
    uniform = [-2.0 * length.double() for length in lengths]
    torch.testing.assert_close(
        preference.simpo(policy, lengths, beta=10.0, gamma=0.0).losses_P,
        preference.ln_dpo(policy, uniform, lengths, beta=10.0).losses_P,
    )
    # Robust DPO: averaging over labels flipped with probability e gives back the clean loss.
    flipped = policy[::-1], reference[::-1]
    clean = 0.9 * preference.robust(*x, beta=0.1, label_smoothing=0.1).losses_P
    noisy = 0.1 * preference.robust(*flipped, beta=0.1, label_smoothing=0.1).losses_P
    torch.testing.assert_close(clean + noisy, dpo, atol=1e-12, rtol=0)
    # Length normalisation divides each response by its own length: a common length is another loss.
    common = preference.dpo(*x, beta=10.0 / float(lengths[0].double().mean())).losses_P
    assert (common - preference.ln_dpo(*x, lengths, beta=10.0).losses_P).abs().max() > 1e-2


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_one_source_is_the_plain_loss_and_source_order_does_not_matter(name):
    batch = random_batch()
    losses_P = pair_losses(batch)[name](*inputs_of(batch)).losses_P
    one_source_P = source_weights(torch.rand(P, 1).double(), None, 0.01).squeeze(-1)
    assert torch.equal(one_source_P * losses_P, losses_P)  # property 1: the mean over prompts is the plain loss
    # Two prompts of K = 3 sources: permuting the sources of each prompt together with their weights.
    scores_GK = torch.tensor([[0.18, 0.165, 0.172], [0.3, 0.3, 0.3]], dtype=torch.float64)
    losses_GK = losses_P[: 2 * K].reshape(2, K)
    order = torch.tensor([2, 0, 1])
    straight = (source_weights(scores_GK, None, 0.01) * losses_GK).sum() / 2
    permuted = (source_weights(scores_GK[:, order], None, 0.01) * losses_GK[:, order]).sum() / 2
    torch.testing.assert_close(straight, permuted, atol=1e-12, rtol=0)
    # Property 2: equal scores weigh 1 / K each.
    torch.testing.assert_close((source_weights(scores_GK, None, 0.01)[1] * losses_GK[1]).sum(), losses_GK[1].mean())


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_any_split_gives_the_same_loss_and_gradient_with_one_global_normaliser(name):
    """Property 10 as far as it lies here: parts of a batch, one prompt's sources spread over two parts."""
    batch = random_batch()
    weights_P = torch.tensor([0.5, 0.3, 0.2, 0.9, 0.1, 0.6, 0.4], dtype=torch.float64)
    num_prompts = 3

    def total(indices, divisor):
        chosen, rejected, *reference = inputs_of(batch)
        chosen.requires_grad_()
        losses_P = pair_losses(batch)[name](chosen, rejected, *reference).losses_P
        loss = (weights_P * losses_P)[indices].sum() / divisor
        (grad,) = torch.autograd.grad(loss, chosen)
        return loss, grad

    whole = total(torch.arange(P), num_prompts)
    parts = [torch.tensor([0, 4]), torch.tensor([1, 2, 3, 5, 6])]
    split = [sum(pieces) for pieces in zip(*(total(p, num_prompts) for p in parts), strict=True)]
    for actual, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    # Negative controls: dividing by rows (pairs) instead of prompts, and by local counts.
    by_rows = total(torch.arange(P), P)
    local = sum(total(p, len(p))[0] for p in parts) / 2
    assert abs((by_rows[0] - whole[0]).item()) > 1e-3
    assert abs((local - whole[0]).item()) > 1e-3
