"""Learning rate and run length: pure functions of the step."""

import math

from fuserl_megatron.config.schema import OptimConfig, TrainerConfig


def total_steps(trainer: TrainerConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the run: the smaller of max_epochs and max_steps."""
    limits = [trainer.max_steps] if trainer.max_steps is not None else []
    if trainer.max_epochs is not None:
        limits.append(trainer.max_epochs * steps_per_epoch)
    return min(limits)


def warmup_steps(optim: OptimConfig, total: int) -> int:
    """Steps of linear warm-up: as given, or the ratio of all steps rounded up."""
    sched = optim.sched
    return sched.warmup_steps if sched.warmup_steps is not None else math.ceil(sched.warmup_ratio * total)


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
