"""How good is the rule for tau (`reward_temperature=auto`)? A simulation of noisy rewards, where the truth is known.

    python benchmarks/temperature_rule.py

The error of a temperature is the mean square distance of the source weights from those of one who knows the qualities:
all weight on the truly best source. It is given as its excess over the error at the best temperature of a grid, in %.
docs/results.md holds the tables, docs/math.md ("Why softmax, and which tau") the reasons.

Shapes: G prompts, K sources, N responses of a source.
"""

import argparse
import math

import torch

from fuserl_megatron.objectives.temperature import rule_temperature, within_prompt_deviation
from fuserl_megatron.objectives.weights import source_scores, source_weights

GRID = [0.0, *torch.logspace(-2, 1.5, 25).tolist(), math.inf]
FINE_GRID = [0.0, *torch.logspace(-2, 1.5, 85).tolist(), math.inf]


class World:
    """Prompts whose sources have Gaussian qualities, and scores of variance 1: the qualities with Gaussian noise."""

    def __init__(self, num_sources, accuracy, num_prompts=6_000, seed=0, grid=GRID):
        generator = torch.Generator().manual_seed(seed)
        self.draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        self.reliability = math.sin(math.pi * (accuracy - 0.5)) ** 2  # the inverse of A = 1/2 + asin(sqrt(lambda)) / pi
        self.quality_GK = self.draw(num_prompts, num_sources) * math.sqrt(self.reliability)
        self.scores_GK = self.scored()
        self.grid, self.found = grid, None

    def scored(self):
        """[G, K] scores: the qualities through a reward model, another draw of its noise each time."""
        return self.quality_GK + self.draw(*self.quality_GK.shape) * math.sqrt(1 - self.reliability)

    def error(self, tau):
        """Of this temperature."""
        return weight_error(self.scores_GK, self.quality_GK, tau)

    def best(self):
        """(error, temperature) of the best of the grid."""
        self.found = self.found or min((self.error(tau), tau) for tau in self.grid)
        return self.found

    def excess(self, tau):
        """By which share the error at tau is larger than the best one."""
        return self.error(tau) / self.best()[0] - 1


def weight_error(scores_GK, quality_GK, tau):
    """Mean square distance of the weights from all weight on the truly best source."""
    return float((source_weights(scores_GK, None, tau) - source_weights(quality_GK, None, 0.0)).square().sum(1).mean())


def accuracy(scores_GK, quality_GK):
    """How often the scores rank two sources rightly."""
    right_G = (scores_GK[:, 0] > scores_GK[:, 1]) == (quality_GK[:, 0] > quality_GK[:, 1])
    return float(right_G.double().mean())


def aggregated(between, within, noise, num_responses=4, num_prompts=6_000, seed=0, grid=GRID):
    """Four sources with several responses each; of a source the best one by reward is used.

    Arguments are variances: of the sources' levels, of the responses around them, of the reward's noise.

    Returns:
        For max and for mean: the error at the best temperature, the excess of the rule with the accuracy of those
        scores, and of the rule with the accuracy on single responses.
    """
    draw, shape = World(4, 0.75, num_prompts, seed).draw, (num_prompts, 4, num_responses)
    quality_GKN = draw(*shape[:2], 1) * between**0.5 + draw(*shape) * within**0.5
    rewards_GKN = quality_GKN + draw(*shape) * noise**0.5
    used_GK = quality_GKN.gather(2, rewards_GKN.argmax(2, keepdim=True)).squeeze(2)
    single = accuracy(rewards_GKN[:, :, 0], quality_GKN[:, :, 0])
    found = {}
    for how in ("max", "mean"):
        scores_GK = source_scores(rewards_GKN, None, how)
        best, deviation = min(weight_error(scores_GK, used_GK, t) for t in grid), within_prompt_deviation(scores_GK)
        taus = [rule_temperature(a, deviation) for a in (accuracy(scores_GK, used_GK), single)]
        found[how] = [best, *(weight_error(scores_GK, used_GK, tau) / best - 1 for tau in taus)]
    return found


def of_the_rule(num_sources, true_accuracy, num_prompts, seeds, draws):
    """One row: the worst excess over the seeds; where the accuracy is counted on 100 pairs, mean and 95 % quantile."""
    tau = rule_temperature(true_accuracy, 1.0)
    worlds = [World(num_sources, true_accuracy, num_prompts, seed, FINE_GRID) for seed in seeds]
    others = [rule_temperature(min(max(true_accuracy + d, 0.501), 1.0), 1.0) for d in (-0.05, 0.05)]
    worst = [max(world.excess(t) for world in worlds) for t in (tau, *others, 0.0, math.inf)]
    generator = torch.Generator().manual_seed(seeds[0])
    counted = (torch.rand(draws, 100, generator=generator) < true_accuracy).double().mean(dim=1).clamp(min=0.501)
    small = World(num_sources, true_accuracy, 10_000, seeds[0], FINE_GRID)
    excess = torch.tensor([small.excess(rule_temperature(a, 1.0)) for a in counted.tolist()])
    return [worlds[0].best()[1], tau, *worst, float(excess.mean()), float(excess.quantile(0.95))]


def main():
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[701, 702, 703])
    parser.add_argument("--prompts", type=int, default=60_000)
    parser.add_argument("--quick", action="store_true", help="two rows a table, few prompts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts, accuracies, prompts, draws = (2, 4, 8), (0.55, 0.65, 0.75, 0.8, 0.9, 0.95, 0.99), options.prompts, 100
    if options.quick:
        counts, accuracies, prompts, draws = (4,), (0.65, 0.9), 5_000, 10
    print(
        "| K | A | best tau | rule | excess of the rule, % | A - 0.05 | A + 0.05 | best source | uniform | 100 pairs |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for number in counts:
        for value in accuracies:
            best, tau, *shares, mean, high = of_the_rule(number, value, prompts, options.seeds, draws)
            cells = " | ".join(f"{100 * share:.1f}" for share in shares)
            print(
                f"| {number} | {value} | {best:.3f} | {tau:.3f} | {cells} | {100 * mean:.1f} ({100 * high:.1f}) |",
                flush=True,
            )
    print(
        "\n| N | levels, responses, noise | error of max | of mean | rule, % (max, mean) | A of single responses, % |"
    )
    print("|---|---|---|---|---|---|")
    cases = [(0.5, 0.5, 0.05), (0.5, 0.5, 0.5), (0.5, 0.5, 1.0), (0.5, 0.5, 2.0), (0.8, 0.2, 1.0), (0.5, 0.1, 1.0)]
    for responses, case in [(4, case) for case in cases[: 2 if options.quick else None]] + [(8, cases[-1])]:
        found = aggregated(*case, responses, prompts, options.seeds[0], FINE_GRID)
        (one, *of_max), (two, *of_mean) = found["max"], found["mean"]
        rule, single = (f"{100 * of_max[i]:.1f}, {100 * of_mean[i]:.1f}" for i in (0, 1))
        print(f"| {responses} | {', '.join(map(str, case))} | {one:.3f} | {two:.3f} | {rule} | {single} |", flush=True)


if __name__ == "__main__":
    main()
