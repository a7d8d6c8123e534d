"""The learning rate: a pure function of the step."""

import math

from fuserl_megatron.config.derived import warmup_steps
from fuserl_megatron.config.schema import OptimConfig


def lr_at(step: int, total: int, optim: OptimConfig) -> float:
    """Learning rate of one step.

    Args:
        step: counted from 0; the first warm-up step has lr / warmup, the last one lr. Cosine and linear come down to
            min_lr at step `total`, the one after the last: a last step at a rate of 0 would be wasted.
        total: steps of the run.
        optim: peak rate and schedule.
    """
    warmup = warmup_steps(optim, total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    sched = optim.sched
    if sched.name == "constant":
        return optim.lr
    done = (step + 1 - warmup) / (total + 1 - warmup)
    share = 0.5 * (1 + math.cos(math.pi * done)) if sched.name == "cosine" else 1 - done
    return sched.min_lr + (optim.lr - sched.min_lr) * share
