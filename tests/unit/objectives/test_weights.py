"""Source weights, selections, advantages, pairs: properties 1-5 and 7 of docs/math.md, limits, degenerate data."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserl_megatron.objectives.weights import (
    best_and_worst_indices,
    effective_number_of_sources,
    reward_gaps,
    rloo_advantages,
    source_scores,
    source_weights,
    standardize,
    top_m_mask,
)

NAN = float("nan")
rewards_strategy = st.lists(st.floats(-10, 10), min_size=1, max_size=6)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def naive_weights(scores, tau):
    """The definition, one prompt, plain Python."""
    top = max(scores)
    terms = [math.exp((s - top) / tau) for s in scores]
    return column(*[t / sum(terms) for t in terms])


@settings(max_examples=50, deadline=None)
@given(rewards_strategy, st.floats(1e-3, 1e3), st.floats(-5, 5), st.floats(0.1, 10))
def test_weights_match_the_definition_and_its_invariances(scores, tau, shift, scale):
    scores_K = column(*scores)
    actual = source_weights(scores_K, None, tau)
    assert actual.dtype == torch.float64
    assert_equal(actual, naive_weights(scores, tau))
    assert actual.sum().item() == pytest.approx(1.0, abs=1e-12)
    # Property 3. Rounding of s + c, of at most 2e-15, is magnified by 1 / tau <= 1000.
    assert_equal(source_weights(scores_K + shift, None, tau), actual, atol=1e-10)
    assert_equal(source_weights(scores_K * scale, None, tau * scale), actual, atol=1e-10)
    # Property 5.
    assert_equal(source_weights(scores_K.flip(0), None, tau).flip(0), actual)


def test_one_source_has_weight_one_and_equal_scores_share_equally():
    for tau in (0.0, 1e-6, 0.01, 1.0, math.inf):
        assert source_weights(column(0.3), None, tau).tolist() == [1.0]
        assert_equal(source_weights(column(0.1, 0.1, 0.1), None, tau), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_limits_of_the_temperature():
    scores_K = column(0.18, 0.165, 0.18, 0.151)
    assert source_weights(scores_K, None, 0.0).tolist() == [0.5, 0.0, 0.5, 0.0]
    assert source_weights(scores_K, None, math.inf).tolist() == [0.25] * 4
    for tau in (1e-5, 1e-300):
        assert_equal(source_weights(scores_K, None, tau), column(0.5, 0, 0.5, 0))
    assert_equal(source_weights(scores_K, None, 1e9), torch.full((4,), 0.25).double(), atol=1e-10)
    assert source_weights(column(1e300, -1e300), None, 1e-300).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("tau", [-1.0, NAN, -math.inf])
def test_a_temperature_that_is_no_temperature_is_refused(tau):
    with pytest.raises(ValueError, match="reward_temperature"):
        source_weights(column(1.0, 2.0), None, tau)


def test_an_absent_source_renormalises_over_the_rest():
    scores_K = column(0.18, NAN, 0.172)
    present_K = torch.tensor([True, False, True])
    for tau in (0.0, 0.01, math.inf):
        actual = source_weights(scores_K, present_K, tau)
        assert actual[1].item() == 0.0
        assert_equal(actual[[0, 2]], source_weights(column(0.18, 0.172), None, tau))
    assert source_weights(scores_K, torch.zeros(3, dtype=torch.bool), 0.01).tolist() == [0.0, 0.0, 0.0]


def test_scores_over_a_data_set_with_holes():
    rewards_GKN = torch.tensor([[[0.1, 0.3], [0.2, NAN]], [[NAN, NAN], [0.5, 0.7]]], dtype=torch.float64)
    mask_GKN = ~rewards_GKN.isnan()
    best_GK = source_scores(rewards_GKN, mask_GKN)
    assert best_GK.tolist() == [[0.3, 0.2], [-math.inf, 0.7]]
    assert_equal(
        source_scores(rewards_GKN, mask_GKN, "mean"), torch.tensor([[0.2, 0.2], [-math.inf, 0.6]], dtype=torch.float64)
    )
    batched = source_weights(best_GK, None, 0.1)
    for g in range(2):
        assert_equal(batched[g], source_weights(best_GK[g], None, 0.1))
    assert batched[1].tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="NaN"):
        source_scores(rewards_GKN)
    with pytest.raises(ValueError, match="median"):
        source_scores(rewards_GKN, mask_GKN, "median")


def test_top_m_keeps_the_best_and_weighs_them_by_their_own_rewards():
    rewards_R = column(0.1, 0.9, 0.4, 0.9, 0.4, 0.2)
    assert top_m_mask(rewards_R, 3).tolist() == [False, True, True, True, False, False]  # tie: lower index
    weights_R = source_weights(rewards_R, top_m_mask(rewards_R, 3), 0.5)
    assert_equal(weights_R[[1, 2, 3]], source_weights(column(0.9, 0.4, 0.9), None, 0.5))
    assert weights_R[[0, 4, 5]].tolist() == [0.0, 0.0, 0.0]
    assert top_m_mask(rewards_R, 99).all()
    mask_R = torch.tensor([True, False, True, False, True, True])
    assert top_m_mask(rewards_R, 2, mask_R).tolist() == [False, False, True, False, True, False]
    # m = 1 is the best response, whatever tau; per_source with one response per source and M = K is the same thing.
    assert source_weights(rewards_R, top_m_mask(rewards_R, 1), 0.01).tolist() == [0, 1, 0, 0, 0, 0]
    assert_equal(source_weights(rewards_R, top_m_mask(rewards_R, 6), 0.3), source_weights(rewards_R, None, 0.3))
    with pytest.raises(ValueError, match="top_m"):
        top_m_mask(rewards_R, 0)


def test_effective_number_of_sources():
    assert_equal(effective_number_of_sources(column(0.25, 0.25, 0.25, 0.25)), torch.tensor(4.0).double())
    assert effective_number_of_sources(column(0, 1, 0)).item() == 1.0
    assert effective_number_of_sources(column(0, 0)).item() == 0.0
    weights_K = column(0.7, 0.2, 0.1)
    expected = math.exp(-sum(w * math.log(w) for w in weights_K.tolist()))
    assert effective_number_of_sources(weights_K.expand(3, 3)).tolist() == pytest.approx([expected] * 3)


def test_standardisation_per_prompt_and_over_the_data_set():
    rewards_GKN = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.15
    mask_GKN = torch.ones(5, 3, 4, dtype=torch.bool)
    mask_GKN[1, 2] = False
    per_prompt = standardize(rewards_GKN, mask_GKN)
    for g in range(5):
        row = per_prompt[g][mask_GKN[g]]
        assert row.mean().item() == pytest.approx(0, abs=1e-12)
        assert row.std(correction=0).item() == pytest.approx(1, abs=1e-12)
    whole = standardize(rewards_GKN, mask_GKN, over="dataset")[mask_GKN]
    expected = (rewards_GKN[mask_GKN] - rewards_GKN[mask_GKN].mean()) / rewards_GKN[mask_GKN].std(correction=0)
    assert_equal(whole, expected)
    # Scale and offset of the reward model fall out.
    assert_equal(standardize(3 * rewards_GKN + 7, mask_GKN), per_prompt, atol=1e-9)
    with pytest.raises(ValueError, match="batch"):
        standardize(rewards_GKN, mask_GKN, over="batch")


def test_standardising_equal_rewards_gives_zeros_not_rounding_noise():
    assert standardize(torch.full((2, 3, 7), 0.1, dtype=torch.float64)).abs().max().item() == 0.0
    assert standardize(column(0.3).reshape(1, 1, 1)).item() == 0.0


@settings(max_examples=50, deadline=None)
@given(rewards_strategy)
def test_rloo_advantages_are_leave_one_out_and_sum_to_zero(rewards):
    actual = rloo_advantages(column(*rewards))
    assert actual.sum().item() == pytest.approx(0, abs=1e-12)  # property 7
    for n, reward in enumerate(rewards):
        others = rewards[:n] + rewards[n + 1 :]
        expected = reward - sum(others) / len(others) if others else 0.0
        assert actual[n].item() == pytest.approx(expected, abs=1e-12)


def test_rloo_advantages_of_degenerate_groups_are_exactly_zero():
    assert rloo_advantages(torch.full((5,), 0.1, dtype=torch.float64)).tolist() == [0.0] * 5
    assert rloo_advantages(column(0.7)).tolist() == [0.0]
    holes = rloo_advantages(column(0.7, NAN, 0.1), torch.tensor([True, False, True]))
    assert_equal(holes, column(0.6, 0.0, -0.6))
    assert rloo_advantages(column(0.7, NAN), torch.tensor([True, False])).tolist() == [0.0, 0.0]
    assert rloo_advantages(column(0.7, NAN), torch.zeros(2, dtype=torch.bool)).tolist() == [0.0, 0.0]


def best_and_worst(rewards_N, mask_N=None):
    """(index of the best, index of the worst) of one source, None where there is no pair."""
    best, worst, has_pair = best_and_worst_indices(rewards_N, mask_N)
    return (int(best), int(worst)) if has_pair else None


def test_best_and_worst_of_a_source():
    assert best_and_worst(column(0.2, 0.9, 0.1, 0.9, 0.1)) == (1, 2)  # ties: lowest index
    assert best_and_worst(column(0.5, 0.5, 0.5)) is None
    assert best_and_worst(column(0.5)) is None
    assert best_and_worst(column(NAN, 0.5, 0.7), torch.tensor([False, True, True])) == (2, 1)
    assert best_and_worst(column(NAN, 0.5), torch.tensor([False, True])) is None
    assert best_and_worst(column(NAN, NAN), torch.zeros(2, dtype=torch.bool)) is None


def test_pairs_of_a_whole_data_set_equal_those_of_each_source():
    generator = torch.Generator().manual_seed(1)
    rewards_GKN = torch.randint(0, 3, (50, 4, 3), generator=generator).double()
    mask_GKN = torch.rand(50, 4, 3, generator=generator) < 0.7
    best_GK, worst_GK, has_pair_GK = best_and_worst_indices(rewards_GKN, mask_GKN)
    assert 0 < has_pair_GK.sum() < has_pair_GK.numel()
    for g in range(50):
        for k in range(4):
            expected = best_and_worst(rewards_GKN[g, k], mask_GKN[g, k])
            actual = (int(best_GK[g, k]), int(worst_GK[g, k])) if has_pair_GK[g, k] else None
            assert actual == expected


def test_reward_gaps_outside_the_unit_interval_are_refused():
    assert_equal(reward_gaps(column(0.9, 0.5), column(0.4, 0.5)), column(0.5, 0.0))
    for chosen, rejected in ((0.4, 0.9), (2.0, 0.5), (NAN, 0.5)):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            reward_gaps(column(chosen), column(rejected))
