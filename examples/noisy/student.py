"""The phase diagram: where which method wins, with a student so small that 24 seeds of a world take seconds.

    python examples/noisy/student.py --out runs/noisy/phase.jsonl

A prompt is a point x in 12 dimensions, an answer one of 5 classes. The right answer is argmax W x, the careless one
argmax V x, both random and linear: a rule to be learned, and a wrong one that sources and student share. The student
is a softmax regression that begins with the habit. The trainer cannot train that; but scores, weights, temperature and
losses are the trainer's own (`fuserl_megatron.objectives`), called as the trainer calls them. Settings are those of an
earlier study, not tuned here; the seeds are new.

Shapes: T seeds, trained side by side; G prompts, K sources, N responses of a source; D dimensions, C classes.
"""

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from fuserl_megatron.objectives import LOSSES
from fuserl_megatron.objectives.batch_loss import StepValues, preference_loss, sft_loss
from fuserl_megatron.objectives.temperature import rule_temperature, within_prompt_deviation
from fuserl_megatron.objectives.weights import best_and_worst_indices, source_scores, source_weights

D, C = 12, 5
NUM_SFT, NUM_PO, NUM_TEST, NUM_HABIT = 60, 240, 1500, 60
HABITS = ((0.5, 0.1), (0.35, 0.4), (0.25, 0.6), (0.15, 0.75))  # probability of the right and of the careless answer
NOISES = (0.05, 0.5, 1.0, 1.5, 2.0, 6.0)
COUNTS = (1, 2, 3, 4, 8)
SWEPT, MULTIPLES = ((0.35, 0.4), (0.25, 0.6)), (0.125, 0.25, 0.5, 2.0, 4.0, 8.0)
"""Where the temperature is swept, in multiples of the rule's; 0, 1 and inf are among the methods."""
SEEDS = tuple(range(301, 325))
SFT, PO = slice(0, NUM_SFT), slice(NUM_SFT, NUM_SFT + NUM_PO)


class Task:
    """T tasks of one world with their training sets: prompts x, answers, rewards, and the best temperature's rule."""

    def __init__(self, right: float, habit: float, noise: float, num_sources: int, seeds=SEEDS, num_samples: int = 4):
        drawn = [self._draw(right, habit, noise, num_sources, num_samples, seed) for seed in seeds]
        for name in drawn[0]:
            setattr(self, name, torch.stack([one[name] for one in drawn]))
        self.use(self.rewards_TGKN)

    def use(self, rewards_TGKN: Tensor) -> None:
        """Take these rewards, with their scores, accuracy and the rule's temperature."""
        self.rewards_TGKN, self.scores_TGK = rewards_TGKN, source_scores(rewards_TGKN)
        self.accuracy, self.tau = self._accuracy(), math.inf
        if self.scores_TGK.shape[2] > 1:
            deviation = within_prompt_deviation(self.scores_TGK[:, :NUM_SFT].flatten(0, 1))
            self.tau = rule_temperature(max(self.accuracy, 0.501), deviation)

    @staticmethod
    def _draw(right, habit, noise, num_sources, num_samples, seed) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        rule_DC, habit_DC = normal(D, C), normal(D, C)
        x_GD, test_GD, first_GD = normal(NUM_SFT + NUM_PO, D), normal(NUM_TEST, D), normal(NUM_HABIT, D)
        shape = (len(x_GD), num_sources, num_samples)
        dice_GKN = torch.rand(shape, generator=generator)
        right_G, careless_G = (x_GD @ rule_DC).argmax(1), (x_GD @ habit_DC).argmax(1)
        other_GKN = torch.randint(C, shape, generator=generator)
        wrong_GKN = torch.where(dice_GKN < right + habit, careless_G[:, None, None], other_GKN)
        answers_GKN = torch.where(dice_GKN < right, right_G[:, None, None], wrong_GKN)
        quality_GKN = (answers_GKN == right_G[:, None, None]).double()
        at_first_G = torch.where(
            torch.rand(NUM_HABIT, generator=generator) < 0.65,
            (first_GD @ habit_DC).argmax(1),
            (first_GD @ rule_DC).argmax(1),
        )
        return dict(
            rule_TDC=rule_DC,
            habit_TDC=habit_DC,
            x_TGD=x_GD,
            answers_TGKN=answers_GKN,
            quality_TGKN=quality_GKN,
            rewards_TGKN=quality_GKN + noise * normal(*shape).double(),
            test_TGD=test_GD,
            truth_TG=(test_GD @ rule_DC).argmax(1),
            first_TGD=first_GD,
            at_first_TG=at_first_G,
        )

    def _accuracy(self) -> float:
        """How often the scores rank two sources' best answers rightly."""
        best_TGK = best_and_worst_indices(self.rewards_TGKN)[0]
        quality_TGK = self.quality_TGKN.gather(3, best_TGK[..., None]).squeeze(3)
        gaps, truth = (v[..., :, None] - v[..., None, :] for v in (self.scores_TGK, quality_TGK))
        counted = truth != 0
        return float(((gaps * truth)[counted] > 0).double().mean()) if counted.any() else 1.0


def train(start_TDC: Tensor, x_TGD: Tensor, answers_TGI: Tensor, loss, steps: int = 100, watch=None) -> Tensor:
    """Full-batch gradient descent with momentum; `loss` is given log pi of the I answers a prompt, [T, G, I].

    `watch` sees the step's number and the weights before it.
    """
    lr = 0.15
    weights_TDC, velocity_TDC = start_TDC.clone().requires_grad_(), torch.zeros_like(start_TDC)
    for step in range(steps):
        if watch:
            watch(step, weights_TDC.detach())
        (gradient_TDC,) = torch.autograd.grad(loss(logps(weights_TDC, x_TGD, answers_TGI)), weights_TDC)
        with torch.no_grad():
            velocity_TDC.mul_(0.9).add_(gradient_TDC / x_TGD.shape[1] + 1e-3 * weights_TDC)
            weights_TDC -= lr * velocity_TDC
    return weights_TDC.detach()


def logps(weights_TDC: Tensor, x_TGD: Tensor, answers_TGI: Tensor) -> Tensor:
    """Log-probability of each answer, [T, G, I]."""
    return (x_TGD @ weights_TDC).log_softmax(2).gather(2, answers_TGI)


def fuse_sft(task: Task, start_TDC: Tensor, part: slice, tau: float) -> Tensor:
    """FuseSFT on some of the prompts."""
    best_TGK = best_and_worst_indices(task.rewards_TGKN[:, part])[0]
    answers_TGK = task.answers_TGKN[:, part].gather(3, best_TGK[..., None]).squeeze(3)
    weights_N = source_weights(task.scores_TGK[:, part], None, tau).flatten()
    ones_N, sources_N = torch.ones_like(weights_N, dtype=torch.int64), torch.zeros_like(weights_N, dtype=torch.int64)
    batch = SimpleNamespace(lengths_N=ones_N, weights_N=weights_N, source_ids_N=sources_N)
    loss = sft_loss("token_mean", ["all"])
    return train(start_TDC, task.x_TGD[:, part], answers_TGK, lambda l: loss(l.flatten(), batch, StepValues())[0])


def fuse_po(
    task: Task, start_TDC: Tensor, part: slice, tau: float, rpo_alpha: float = 0.3, keep_TGK=True, **options
) -> Tensor:
    """FusePO-DPO on some of the prompts, beta 0.5, with an SFT term; `keep_TGK` may leave pairs out."""
    best_TGK, worst_TGK, has_pair_TGK = best_and_worst_indices(task.rewards_TGKN[:, part])
    answers = task.answers_TGKN[:, part]
    both_TG2K = [answers.gather(3, index[..., None]).squeeze(3) for index in (best_TGK, worst_TGK)]
    answers_TGI = torch.cat(both_TG2K, dim=2)  # each source's best, then each source's worst
    index_TGI = torch.arange(answers_TGI.numel()).view_as(answers_TGI)
    chosen_P, rejected_P = (half.flatten() for half in index_TGI.chunk(2, dim=2))
    batch = SimpleNamespace(
        lengths_N=torch.ones(answers_TGI.numel(), dtype=torch.int64),
        chosen_index_P=chosen_P,
        rejected_index_P=rejected_P,
        pair_weights_P=source_weights(task.scores_TGK[:, part], has_pair_TGK & keep_TGK, tau).flatten(),
        pair_source_ids_P=torch.zeros_like(chosen_P),
        reference_logps_N=logps(start_TDC, task.x_TGD[:, part], answers_TGI).flatten(),
    )
    spec = LOSSES["dpo"]
    loss = preference_loss(spec, spec.complete({"beta": 0.5, "rpo_alpha": rpo_alpha}), ["all"])
    return train(
        start_TDC, task.x_TGD[:, part], answers_TGI, lambda l: loss(l.flatten(), batch, StepValues())[0], **options
    )


def weak_target(task: Task) -> Tensor:
    """Trained on 60 points, 65 % of them answered carelessly."""
    nothing_TDC, ones_N = torch.zeros(len(task.x_TGD), D, C), torch.ones(task.at_first_TG.numel())
    batch = SimpleNamespace(lengths_N=ones_N.long(), weights_N=ones_N, source_ids_N=torch.zeros_like(ones_N).long())
    loss, answers_TG1 = sft_loss("token_mean", ["all"]), task.at_first_TG[..., None]
    return train(nothing_TDC, task.first_TGD, answers_TG1, lambda l: loss(l.flatten(), batch, StepValues())[0], 60)


def accuracies(task: Task, weights_TDC: Tensor) -> list[float]:
    """On the test points, %, seed by seed."""
    right_TG = (task.test_TGD @ weights_TDC).argmax(2) == task.truth_TG
    return [round(100 * float(share), 2) for share in right_TG.double().mean(dim=1)]


def compare(task: Task, swept: bool = False) -> dict[str, list[float]]:
    """Every method's accuracies; if swept, FuseRL's at other temperatures, too."""
    target = weak_target(task)
    fused, best, uniform = (fuse_sft(task, target, SFT, tau) for tau in (task.tau, 0.0, math.inf))
    models = {
        "target": target,
        "SFT(best)": best,
        "uniform SFT": uniform,
        "FuseSFT": fused,
        "FuseSFT + more FuseSFT": fuse_sft(task, fused, PO, task.tau),
        "SFT(best) + DPO": fuse_po(task, best, PO, 0.0),
        "uniform SFT + uniform DPO": fuse_po(task, uniform, PO, math.inf),
        "FuseSFT + FusePO-DPO": fuse_po(task, fused, PO, task.tau),
    }
    for multiple in MULTIPLES if swept else ():
        tau = multiple * task.tau
        first = models[f"FuseSFT, rule x {multiple:g}"] = fuse_sft(task, target, SFT, tau)
        models[f"FuseSFT + FusePO-DPO, rule x {multiple:g}"] = fuse_po(task, first, PO, tau)
    return {name: accuracies(task, model) for name, model in models.items()}


def main() -> None:
    """Write one line a world: the phase diagram, then the number of sources."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/noisy/phase.jsonl", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    worlds = [(*habit, noise, 4) for habit in HABITS for noise in NOISES]
    worlds += [(0.35, 0.4, 1.0, count) for count in COUNTS if count != 4]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w") as out:
        for world in worlds:
            task = Task(*world)
            line = dict(zip(("right", "habit", "noise", "sources"), world, strict=True))
            swept = world[:2] in SWEPT and 0.5 <= world[2] <= 2 and world[3] == 4
            line |= {"reward_accuracy": round(task.accuracy, 3), "tau": round(task.tau, 3), **compare(task, swept)}
            out.write(json.dumps(line) + "\n")
            means = {name: round(sum(v) / len(v), 1) for name, v in line.items() if isinstance(v, list)}
            print(world, line["reward_accuracy"], line["tau"], means, flush=True)


if __name__ == "__main__":
    main()
