"""Validation on held-out prompts, and the two decisions taken from it: which checkpoints are best, when to stop early.

Every validation is one line of validation.jsonl: the step and each metric with `val_` in front. Both decisions are
functions of that history alone, so a resumed run takes the ones the unbroken run would have taken. Rank 0 reads and
decides, all ranks learn.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fuserl_megatron.config.objective import open_loss
from fuserl_megatron.config.schema import Config
from fuserl_megatron.mcore.parallel import Layout
from fuserl_megatron.mcore.step import Engine, evaluate, reduced
from fuserl_megatron.metrics.run_files import VALIDATION
from fuserl_megatron.metrics.run_log import Lines
from fuserl_megatron.runtime.collectives import from_main_rank
from fuserl_megatron.train.feed import Feed, step_values


def is_due(config: Config, step: int, total: int) -> bool:
    """Whether there is a validation after this many steps (0: before the first)."""
    every = config.trainer.val_check_interval
    return step in (0, total) or bool(every and step % every == 0)


def validate(
    config: Config, engine: Engine, feed: Feed, step: int, total: int, between_batches: Callable[[], None]
) -> dict[str, float]:
    """Loss and metrics of the held-out prompts under the weights after `step` steps, equal on all ranks.

    Prompts come in the order of the data set, global_batch_size at a time (over which KTO's reference point is taken).

    What `between_batches` raises leaves no trace: nothing is recorded, and a resumed run validates here first.

    Raises:
        NonFiniteError: a loss that is not finite.
    """
    held_out = feed.prepared.dataset
    objective = open_loss(config, held_out.sources)
    names = objective.metric_names
    engine = replace(engine, loss=objective, metric_names=names, source_names=held_out.sources, place=held_out.place)
    sums, normalizer = 0, 0.0
    totals_M2: torch.Tensor | None = None
    for plan in feed.sampler.scoring_plans(first_prompts=config.trainer.limit_val_prompts):
        between_batches()
        values = step_values(config, engine, feed, plan, step, total)
        part_M2 = evaluate(engine, feed.batches(plan, engine.layout.dp_rank), values)
        totals_M2 = part_M2 if totals_M2 is None else totals_M2 + part_M2
        normalizer += plan.normalizer(config.objective.nll_reduction)
        sums += plan.num_prompts
    assert totals_M2 is not None
    loss, metrics = reduced(engine, totals_M2)
    return {"val_loss": loss / normalizer, **{f"val_{k}": v for k, v in metrics.items()}, "val_prompts": sums}


class History:
    """The validations of a run so far (rank 0). They travel in every checkpoint; validation.jsonl is for readers."""

    def __init__(self, config: Config, directory: Path, records: list[dict], is_main: bool):
        """Go on from the validations in the checkpoint resumed from; later ones in validation.jsonl are dropped."""
        self.path = directory / VALIDATION
        params = config.exp_manager.checkpoint_callback_params
        self.monitor, self.top_k, self.sign = params.monitor, params.save_top_k, 1.0 if params.mode == "min" else -1.0
        self.stopping = config.exp_manager.early_stopping_callback_params
        self.records = list(records)
        self._lines: Lines | None = None
        if is_main:
            directory.mkdir(parents=True, exist_ok=True)
        if is_main and (self.records or self.path.exists()):  # a file is there only where something was validated
            self.path.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Append one validation (rank 0)."""
        record = {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self.records.append(record)
        self._lines = self._lines or Lines(self.path)
        self._lines.add(record)

    def close(self) -> None:
        """Write the rest."""
        if self._lines:
            self._lines.close()

    def lacks(self, step: int) -> bool:
        """Whether the validation after this step is not recorded: the run was stopped in the middle of it."""
        return all(record["step"] != step for record in self.records)

    def kept_steps(self) -> list[int]:
        """The save_top_k best steps by the monitored metric (ties: the earlier one); step 0 has no checkpoint."""
        if self.monitor is None:
            return []
        known = [r for r in self.records if r["step"] and r.get(self.monitor) is not None]
        best = [step for _, step in sorted((self.sign * r[self.monitor], r["step"]) for r in known)]
        return best if self.top_k < 0 else best[: self.top_k]

    def decisions(self, step: int, layout: Layout) -> tuple[bool, bool, list[int]]:
        """Whether this step is among the best, whether to stop, which are the best: rank 0's answer, on all ranks."""
        kept = self.kept_steps()
        return from_main_rank((step in kept, self.should_stop(), kept), layout.device)

    def should_stop(self) -> bool:
        """Whether `patience` validations in a row brought no new best value (a value that is not a number is none)."""
        if self.stopping.patience is None:
            return False
        best, waited = math.inf, 0
        for record in sorted(self.records, key=lambda r: r["step"]):
            value = record.get(self.monitor)
            if value is not None and self.sign * value < best - self.stopping.min_delta:
                best, waited = self.sign * value, 0
            else:
                waited += 1
        return waited >= self.stopping.patience
