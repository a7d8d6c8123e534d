"""A learned reward, which errs in the same way whenever it is asked: what of the methods survives, and what helps.

    python examples/noisy/learned.py --out runs/noisy/learned.jsonl

The worlds of student.py (right 0.25, habit 0.6), whose rewards now come from a reward model: linear in 8 of the 12
dimensions of a prompt, for each answer, trained as Bradley-Terry on a number of noisy comparisons. It cannot be right
everywhere, its errors are a function of prompt and answer, and more answers do not average them out. Seeds 401 to 424.

Shapes: as in student.py; M comparisons, E reward models of an ensemble.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from student import PO, SFT, C, D, Task, accuracies, compare, fuse_po, fuse_sft, weak_target
from torch import Tensor
from torch.nn.functional import logsigmoid

SEEDS = tuple(range(401, 425))
SEEN = 8  # dimensions of a prompt that the reward model sees
ENSEMBLE = 5
COMPARISONS = (100, 400, 1600)
LABEL_SCALE = 0.5  # a label is right with probability sigmoid(difference of quality / this)


def comparisons(task: Task, number: int, seeds) -> tuple[Tensor, Tensor]:
    """Prompts [T, M, D] and answers [T, M, 2], the preferred one first, as noisy labels say."""
    found = []
    for seed, rule_DC, habit_DC in zip(seeds, task.rule_TDC, task.habit_TDC, strict=True):
        generator = torch.Generator().manual_seed(1000 + seed)
        x_MD = torch.randn(number, D, generator=generator)
        right_M, careless_M = (x_MD @ rule_DC).argmax(1), (x_MD @ habit_DC).argmax(1)
        dice_M2 = torch.rand(number, 2, generator=generator)
        other_M2 = torch.randint(C, (number, 2), generator=generator)
        answers_M2 = torch.where(dice_M2 < 0.85, careless_M[:, None], other_M2)
        answers_M2 = torch.where(dice_M2 < 0.25, right_M[:, None], answers_M2)
        quality_M2 = (answers_M2 == right_M[:, None]).double()
        first_M = torch.sigmoid((quality_M2[:, 0] - quality_M2[:, 1]) / LABEL_SCALE)
        swapped_M = torch.rand(number, generator=generator) >= first_M
        answers_M2[swapped_M] = answers_M2[swapped_M].flip(1)
        found.append((x_MD, answers_M2))
    return tuple(map(torch.stack, zip(*found, strict=True)))


def reward_models(task: Task, number: int, seeds=SEEDS) -> Tensor:
    """Bradley-Terry models of one set of comparisons, each of a bootstrap sample of it: [E, T, SEEN, C]."""
    x_TMD, answers_TM2 = comparisons(task, number, seeds)
    generator, models = torch.Generator().manual_seed(7), []
    for _ in range(ENSEMBLE):
        index_M = torch.randint(number, (number,), generator=generator)
        seen, answers = x_TMD[:, index_M, :SEEN], answers_TM2[:, index_M]
        weights_TSC = torch.zeros(len(seen), SEEN, C, requires_grad=True)
        optimizer = torch.optim.Adam([weights_TSC], lr=0.1)
        for _ in range(200):
            scores_TM2 = (seen @ weights_TSC).gather(2, answers)
            loss = -logsigmoid(scores_TM2[..., 0] - scores_TM2[..., 1]).mean(1).sum()
            optimizer.zero_grad()
            (loss + 3e-3 * weights_TSC.square().sum()).backward()
            optimizer.step()
        models.append(weights_TSC.detach())
    return torch.stack(models)


def rewards_of(models_ETSC: Tensor, task: Task) -> Tensor:
    """Of all stored answers, [E, T, G, K, N]."""
    scores_ETGC = task.x_TGD[..., :SEEN] @ models_ETSC
    size, index = len(models_ETSC), task.answers_TGKN.flatten(2)
    return scores_ETGC.gather(3, index.expand(size, *index.shape)).unflatten(3, task.answers_TGKN.shape[2:])


def what_helps(task: Task) -> dict[str, list[float]]:
    """FuseRL with single changes, from the same FuseSFT model."""
    fused = fuse_sft(task, weak_target(task), SFT, task.tau)
    gap_TGK = (task.rewards_TGKN.amax(3) - task.rewards_TGKN.amin(3))[:, PO]
    wide_TGK = gap_TGK >= gap_TGK[gap_TGK > 0].median()
    seen: dict[int, list[float]] = {}
    models = {
        "no SFT term": fuse_po(task, fused, PO, task.tau, rpo_alpha=0.0),
        "SFT term 1": fuse_po(task, fused, PO, task.tau, rpo_alpha=1.0),
        "wider half of the gaps": fuse_po(task, fused, PO, task.tau, keep_TGK=wide_TGK),
        "narrower half of the gaps": fuse_po(task, fused, PO, task.tau, keep_TGK=~wide_TGK),
        "half the rule's tau": fuse_po(task, fused, PO, task.tau / 2),
        "uniform weights": fuse_po(task, fused, PO, math.inf),
        "400 steps": fuse_po(task, fused, PO, task.tau, steps=401, watch=lambda i, w: seen.update(_seen(task, i, w))),
    }
    # the first 300 test points say when to stop, the others are what is reported
    steps = sorted(seen)
    chosen = torch.tensor([[seen[i][0][t] for i in steps] for t in range(len(task.x_TGD))]).argmax(1)
    stopped = [round(seen[steps[int(i)]][1][t], 2) for t, i in enumerate(chosen)]
    return {name: accuracies(task, model) for name, model in models.items()} | {"stopped by true reward": stopped}


def _seen(task: Task, step: int, weights_TDC: Tensor) -> dict[int, tuple[list[float], list[float]]]:
    if step % 20:
        return {}
    right_TG = ((task.test_TGD @ weights_TDC).argmax(2) == task.truth_TG).double()
    return {step: tuple((100 * part.mean(1)).tolist() for part in (right_TG[:, :300], right_TG[:, 300:]))}


def main() -> None:
    """Write one line for each number of comparisons and kind of reward."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/noisy/learned.jsonl", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with open(options.out, "w") as out:
        for number in COMPARISONS:
            task = Task(0.25, 0.6, 0.0, 4, SEEDS)
            rewards_ETGKN = rewards_of(reward_models(task, number), task)
            kinds = {
                "one model": rewards_ETGKN[0],
                "mean of 5": rewards_ETGKN.mean(0),
                "worst of 5": rewards_ETGKN.amin(0),
            }
            for kind, rewards_TGKN in kinds.items():
                task.use(rewards_TGKN)
                line = {"comparisons": number, "reward": kind, "reward_accuracy": round(task.accuracy, 3)}
                line |= {"tau": round(task.tau, 3), **compare(task), **what_helps(task)}
                out.write(json.dumps(line) + "\n")
                means = {name: round(sum(v) / len(v), 1) for name, v in line.items() if isinstance(v, list)}
                print(number, kind, line["reward_accuracy"], line["tau"], means, flush=True)


if __name__ == "__main__":
    main()
