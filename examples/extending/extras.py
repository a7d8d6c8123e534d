"""A loss, a metric, a record reader and a launcher of one's own. docs/extending.md goes through them.

Put this folder on PYTHONPATH; settings name the objects: objective.loss=extras:APO_ZERO.
"""

import json
import shlex

import torch

from fuserl_megatron.launch.local import local_command
from fuserl_megatron.objectives import LossSpec
from fuserl_megatron.objectives.preference import PairLoss, implicit_rewards
from fuserl_megatron.objectives.spec import not_negative, positive


def apo_zero(policy, reference, *, beta, pull):
    """APO-zero: 1 - s(b h+) + pull s(b h-) (arXiv 2408.06266 has pull = 1)."""
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    losses_P = 1 - torch.sigmoid(chosen_P) + pull * torch.sigmoid(rejected_P)
    return PairLoss(losses_P, chosen_P.detach(), rejected_P.detach())


APO_ZERO = LossSpec(
    name="apo_zero",
    function=apo_zero,
    needs=("policy", "reference"),
    options={"beta": positive(0.1), "pull": not_negative(1.0), "rpo_alpha": not_negative(0.0)},
    start=lambda options: 0.5 + 0.5 * options["pull"],
)


def longer_chosen(logps_N, batch):
    """Share of pairs whose chosen response is the longer one."""
    lengths_N = batch.lengths_N
    return (lengths_N[batch.chosen_index_P] > lengths_N[batch.rejected_index_P]).double(), None


def ranked_lists(path):
    """Reads {"question": ..., "answers": {source: [[text, score], ...]}}, an object a line."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            row = json.loads(line)
            for source, answers in row["answers"].items():
                for text, score in answers:
                    yield number, dict(prompt=row["question"], source=source, response=text, reward=score)


class ShellScript:
    """Writes one shell script that runs the chain on this machine, for a queue that fuserl does not know."""

    def check(self, pipeline):
        """Nothing can be in the way."""

    def plan(self, pipeline, stages):
        """The script."""
        lines = ["#!/bin/sh", "set -e"]
        for stage in stages:
            lines.append(shlex.join(local_command(stage)))
            lines += [f"[ ! -e {shlex.quote(stage.results_dir)}/REQUEUE ] || exit 0"] if stage.resumes else []
            lines.append(f"echo {stage.hash} > {shlex.quote(str(pipeline.done_file(stage)))}")
        return "\n".join([*lines, ""])

    def start(self, pipeline, stages):
        """Write it; somebody else runs it."""
        script = pipeline.folder / "chain.sh"
        script.write_text(self.plan(pipeline, stages), encoding="utf-8")
        print(f"written: {script}")
        return 0
