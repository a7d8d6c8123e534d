"""The rule for tau: its values, that no other temperature beats it where its model holds, and what A and s_r are."""

import math
import sys
from pathlib import Path

import pytest
import torch

from fuserl_megatron.objectives.temperature import (
    CONSTANT,
    accuracy_of_agreement,
    correlation_interval,
    rule_temperature,
    score_correlation,
    share_interval,
    within_prompt_deviation,
)
from fuserl_megatron.objectives.weights import source_scores, source_weights

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from temperature_rule import GRID, World, accuracy, aggregated  # noqa: E402

ABSENT = -math.inf


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Arrays are small, and threads that wait for each other on a busy machine cost ten times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_golden_values():
    assert rule_temperature(0.75, 1.0) == pytest.approx(0.83, abs=1e-12)
    assert rule_temperature(0.65, 1.0) == pytest.approx(1.6289667195692745, abs=1e-12)
    assert rule_temperature(0.9, 1.0) == pytest.approx(0.2696833478733123, abs=1e-12)
    assert rule_temperature(1.0, 1.0) == 0.0 == rule_temperature(0.75, 0.0)
    assert rule_temperature(0.75, 0.012) == pytest.approx(0.00996, abs=1e-12)
    assert CONSTANT == round(math.sqrt(2) / 1.702, 2)


def test_it_falls_from_uniform_to_the_best_source():
    taus = [rule_temperature(a / 1000, 1.0) for a in range(501, 1001)]
    assert taus == sorted(taus, reverse=True) and taus[0] > 250 and taus[-2] < 0.003 and taus[-1] == 0.0


@pytest.mark.parametrize(
    ("values", "says"),
    [((a, 1.0), "accuracy") for a in (0.5, 0.2, 0.0, 1.01, math.nan, math.inf)]
    + [((0.75, s), "deviation") for s in (-1.0, math.nan, math.inf)],
)
def test_what_has_no_temperature(values, says):
    with pytest.raises(ValueError, match=says):
        rule_temperature(*values)


@pytest.mark.parametrize("accuracy", [0.55, 0.75, 0.95])
def test_for_two_sources_the_weights_are_the_posterior(accuracy):
    """P(source 1 is better | scores) is a normal distribution function; the weights are within 0.01 of it."""
    reliability = math.sin(math.pi * (accuracy - 0.5)) ** 2
    gap_P = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    exact_P = torch.special.ndtr(gap_P * math.sqrt(reliability / (1 - reliability) / 2))
    scores_PK = torch.stack([gap_P, torch.zeros_like(gap_P)], dim=1)
    weights_P = source_weights(scores_PK, None, rule_temperature(accuracy, 1.0))[:, 0]
    assert float((weights_P - exact_P).abs().max()) < 0.01
    off_P = source_weights(scores_PK, None, 1.5 * rule_temperature(accuracy, 1.0))[:, 0]
    assert float((off_P - exact_P).abs().max()) > 0.05, "the comparison sees a wrong temperature"


@pytest.mark.parametrize("num_sources", [2, 4, 8])
@pytest.mark.parametrize("true_accuracy", [0.55, 0.65, 0.75, 0.9, 0.99])
def test_no_temperature_of_a_grid_beats_it_by_one_percent(num_sources, true_accuracy):
    world = World(num_sources, true_accuracy)
    assert world.excess(rule_temperature(true_accuracy, 1.0)) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("num_sources", range(2, 9))
def test_no_temperature_beats_it_in_large(num_sources):
    for hundredths in (*range(55, 100, 5), 99):
        world = World(num_sources, hundredths / 100, num_prompts=60_000, seed=hundredths)
        assert world.excess(rule_temperature(hundredths / 100, 1.0)) < 0.01, hundredths


@pytest.mark.parametrize("true_accuracy", [0.65, 0.75, 0.9])
def test_another_temperature_is_told_apart(true_accuracy):
    """The negative control of the one above: a third or three times the rule's, the best source alone, uniform."""
    world, tau = World(4, true_accuracy), rule_temperature(true_accuracy, 1.0)
    assert min(map(world.excess, (tau / 3, tau * 3, 0.0, math.inf))) > 0.04


def test_a_reward_that_knows_nothing_is_best_ignored():
    world = World(4, 0.75)
    world.scores_GK = world.scores_GK[torch.randperm(len(world.scores_GK), generator=torch.Generator().manual_seed(1))]
    assert min(GRID, key=world.error) == math.inf
    measured = accuracy(world.scores_GK, world.quality_GK)
    assert 0.48 < measured < 0.52 and world.excess(rule_temperature(max(measured, 0.501), 1.0)) < 0.01


@pytest.mark.parametrize("true_accuracy", [0.6, 0.7, 0.8])
@pytest.mark.parametrize("wrong_by", [-0.05, 0.05])
def test_an_accuracy_that_is_wrong_by_five_points_costs_at_most_four_percent(true_accuracy, wrong_by):
    world = World(4, true_accuracy)
    assert world.excess(rule_temperature(true_accuracy + wrong_by, 1.0)) < 0.04


def test_the_model_s_accuracy_is_the_one_that_is_counted():
    for expected in (0.6, 0.75, 0.9):
        world = World(2, expected)
        assert accuracy(world.scores_GK, world.quality_GK) == pytest.approx(expected, abs=0.01)


def test_the_deviation_within_prompts_by_hand():
    scores_GK = torch.tensor([[1.0, 3.0, ABSENT], [0.0, 1.0, 2.0], [7.0, ABSENT, ABSENT], [ABSENT] * 3])
    assert within_prompt_deviation(scores_GK) == pytest.approx(math.sqrt((2.0 + 1.0) / 2), abs=1e-12)
    assert within_prompt_deviation(scores_GK[:2] + 1e6) == pytest.approx(math.sqrt(1.5), abs=1e-9)
    assert within_prompt_deviation(scores_GK[:2] * 0.01) == pytest.approx(0.01 * math.sqrt(1.5), abs=1e-9)
    assert math.isnan(within_prompt_deviation(scores_GK[2:])) and math.isnan(within_prompt_deviation(scores_GK[:0]))
    assert within_prompt_deviation(torch.zeros(5, 3)) == 0.0


def test_the_deviation_does_not_depend_on_prompts_levels_or_absent_sources():
    world = World(4, 0.75)
    levels_G1 = 10 * world.draw(len(world.scores_GK), 1)
    assert within_prompt_deviation(world.scores_GK + levels_G1) == pytest.approx(1.0, abs=0.01)
    holes_GK = torch.where(world.draw(*world.scores_GK.shape) > 0.5, ABSENT, world.scores_GK)
    assert within_prompt_deviation(holes_GK) == pytest.approx(1.0, abs=0.02)


def test_two_equally_good_reward_models_tell_the_accuracy():
    for expected in (0.6, 0.75, 0.9):
        world = World(4, expected)
        other_GK = 30 * world.scored() + 5  # in units of its own
        correlation, number = score_correlation(world.scores_GK, other_GK)
        assert accuracy_of_agreement(correlation) == pytest.approx(expected, abs=0.01) and number == 3 * 6_000
        low, high = (accuracy_of_agreement(end) for end in correlation_interval(correlation, number))
        assert low < expected < high and high - low < 0.04


def test_errors_that_two_reward_models_share_make_the_temperature_too_small():
    """The limit of that estimate, as docs/math.md says: half of the noise is in both."""
    world = World(4, 0.75)
    shared_GK, half = world.draw(*world.quality_GK.shape), math.sqrt((1 - world.reliability) / 2)
    one_GK, other_GK = (world.quality_GK + half * (shared_GK + world.draw(*shared_GK.shape)) for _ in range(2))
    found = accuracy_of_agreement(score_correlation(one_GK, other_GK)[0])
    assert found > 0.82 and accuracy(one_GK, world.quality_GK) == pytest.approx(0.75, abs=0.01)


def test_a_much_worse_second_reward_model_makes_the_accuracy_too_small():
    world = World(4, 0.75)
    other_GK = world.quality_GK + 2 * (world.scored() - world.quality_GK)
    found = accuracy_of_agreement(score_correlation(world.scores_GK, other_GK)[0])
    assert found == pytest.approx(0.69, abs=0.01)


def test_agreement_about_means_is_not_accuracy_about_the_answers_used():
    """docs/math.md: with score_aggregation=mean the correlation gives too large an accuracy."""
    draw, shape = World(4, 0.75).draw, (6_000, 4, 4)
    quality_GKN = (draw(*shape[:2], 1) + draw(*shape)) * math.sqrt(0.5)
    one_GKN, other_GKN = (quality_GKN + draw(*shape) for _ in range(2))
    used_GK = quality_GKN.gather(2, one_GKN.argmax(2, keepdim=True)).squeeze(2)
    for how, off in (("max", 0.02), ("mean", 0.09)):
        scores = [source_scores(rewards_GKN, None, how) for rewards_GKN in (one_GKN, other_GKN)]
        found = accuracy_of_agreement(score_correlation(*scores)[0]) - accuracy(scores[0], used_GK)
        assert abs(found) < off and (how == "max" or found > 0.05)


def test_correlation_by_hand_and_without_anything_to_compare():
    one_GK = torch.tensor([[0.0, 2.0], [5.0, 5.0 + 4.0], [1.0, ABSENT]], dtype=torch.float64)
    other_GK = torch.tensor([[0.0, 1.0], [9.0, 8.0], [1.0, ABSENT]], dtype=torch.float64)
    assert score_correlation(one_GK, other_GK) == (pytest.approx((1 - 2) / math.sqrt(10), abs=1e-12), 2)
    assert score_correlation(one_GK, one_GK)[0] == pytest.approx(1.0, abs=1e-12)
    assert score_correlation(one_GK * 1e99, other_GK * 1e-99)[0] == pytest.approx(-1 / math.sqrt(10), abs=1e-12)
    assert math.isnan(score_correlation(one_GK, torch.where(other_GK == ABSENT, ABSENT, 0.0))[0])
    assert accuracy_of_agreement(-0.3) == 0.5 and accuracy_of_agreement(1.0) == 1.0


def test_intervals():
    assert share_interval(0.75, 100) == (pytest.approx(0.6569, abs=1e-4), pytest.approx(0.8245, abs=1e-4))
    assert share_interval(1.0, 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)
    assert correlation_interval(0.5, 27) == (pytest.approx(0.1560, abs=1e-4), pytest.approx(0.7358, abs=1e-4))
    assert correlation_interval(0.9, 2) == (-1.0, 1.0) and correlation_interval(1.0, 9) == (1.0, 1.0)


def test_the_share_s_interval_holds_the_truth_in_95_of_100_counts():
    generator = torch.Generator().manual_seed(3)
    right = (torch.rand(2000, 100, generator=generator) < 0.75).double().mean(dim=1).tolist()
    held = sum(low <= 0.75 <= high for low, high in (share_interval(share, 100) for share in right))
    assert 0.935 < held / 2000 < 0.965


@pytest.mark.parametrize(
    ("variances", "better"),
    [((0.5, 0.5, 0.05), "max"), ((0.5, 0.1, 1.0), "mean"), ((0.8, 0.2, 1.0), "mean"), ((0.5, 0.5, 2.0), "mean")],
)
def test_max_is_for_precise_rewards_and_mean_for_noisy_ones(variances, better):
    """docs/data_format.md. The rule serves both, as long as A is the accuracy of the scores that are used."""
    found = aggregated(*variances)
    (of_max, rule_of_max, _), (of_mean, rule_of_mean, _) = found["max"], found["mean"]
    assert (of_max < 0.985 * of_mean) if better == "max" else (of_mean < 0.985 * of_max)
    assert max(rule_of_max, rule_of_mean) < 0.01


def test_the_accuracy_of_single_responses_is_not_that_of_their_means():
    """docs/math.md: with score_aggregation=mean, A of single responses gives too large a temperature."""
    found = aggregated(0.5, 0.1, 1.0)
    assert found["max"][2] < 0.025 and found["mean"][2] > 0.03
