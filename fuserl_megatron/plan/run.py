"""The plans of one run: its model, its data, its settings."""

from dataclasses import asdict, dataclass
from typing import Any

from fuserl_megatron.config.derived import row_settings, total_steps
from fuserl_megatron.config.objective import uses_reference
from fuserl_megatron.config.schema import Config
from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.convert.peft import layer_parameters
from fuserl_megatron.plan.cards import Card
from fuserl_megatron.plan.layouts import HEADROOM, Plan, overrides, plans
from fuserl_megatron.plan.memory import Keeping
from fuserl_megatron.plan.step_time import Matrices, Work
from fuserl_megatron.util.hub import local_model

PARTS = ("weights", "gradients", "states", "activations", "logits", "reference", "other")


@dataclass(frozen=True)
class Planned:
    """What `fuserl plan` prints."""

    facts: list[str]
    plans: list[Plan]
    nearest: str | None
    """Why nothing fits, and what would."""
    work: Work
    steps: int | None

    def table(self, most: int) -> list[list[str]]:
        """A head and a row for each of the first `most` plans."""
        rows = [["TP", "PP", "VPP", "CP", "DP", "recompute", "s/step", "tokens/s/GPU", "MFU", "hours", "GB", *PARTS]]
        for p in self.plans[:most]:
            layout = p.layout
            sizes = [str(n) for n in (layout.tp, layout.pp, layout.vpp, layout.cp, layout.dp)]
            rate = self.work.rows * self.work.length / p.step / layout.gpus
            hours = f"{p.step * self.steps / 3600:.2f}" if self.steps else "-"
            memory = [f"{p.memory[name] / 1e9:.1f}" for name in PARTS]
            figures = [f"{p.step:.2f}", f"{rate:,.0f}", f"{p.mfu:.1%}", hours, f"{p.total_memory / 1e9:.0f}"]
            rows.append([*sizes, layout.recompute, *figures, *memory])
        return rows

    def overrides(self) -> list[str]:
        """What to type for the fastest one."""
        return overrides(self.plans[0].layout, self.work.format)

    def as_json(self) -> list[dict[str, Any]]:
        """All plans."""
        return [asdict(plan) for plan in self.plans]


def planned(config: Config, gpus: int, card: Card, rows: int | None) -> Planned:
    """Every layout that fits, the fastest first.

    Args:
        config: the run; its own layout is not read.
        gpus: how many there are.
        card: of this kind.
        rows: packed rows of a step; None: counted from data.path.

    Raises:
        UserError: the model or data set cannot be read.
    """
    shape = read_config(local_model(config.model.path, weights=False))
    model, data = Matrices.of(shape), config.data
    facts, steps, length = [], None, data.seq_length
    if rows is None:
        rows, steps, fact = _of_data(config)
        facts.append(fact)
    adapter, number_format = config.adapter, "fp8" if config.trainer.precision.startswith("fp8") else "bf16"
    work = Work(rows, length, number_format, frozen=adapter.kind == "lora")
    resident = uses_reference(config.objective) and config.objective.reference_mode == "resident"
    factors = layer_parameters(shape, adapter) if adapter.kind == "lora" else None
    keeping = Keeping(length, data.micro_batch_size, True, config.model.logprob_chunk_size, resident, factors)
    found, smallest = plans(model, gpus, card, work, keeping)
    facts.insert(
        0,
        f"{config.model.path}: {model.parameters / 1e9:.2f} B parameters in matrices; {rows} rows of {length} a step; "
        f"{gpus} x {card.name} of {card.memory / 1e9:.0f} GB",
    )
    nearest = None if found else _nearest(smallest, model, gpus, card, work, keeping)
    return Planned(facts, found, nearest, work, steps)


def _of_data(config: Config) -> tuple[int, int, str]:
    """Rows of the first step, steps of the run, and where they come from."""
    from fuserl_megatron.data.dataset import FusedDataset
    from fuserl_megatron.data.pairs import prepare
    from fuserl_megatron.data.sampler import GlobalBatchSampler
    from fuserl_megatron.data.too_long import fitted

    settings = row_settings(config)
    dataset = FusedDataset(config.data.path, verify=False)
    prepared = fitted(prepare(dataset, config.objective, config.data.reward_temperature), settings)
    sampler = GlobalBatchSampler(prepared, settings, config.run.seed, 1)
    rows = sampler.step(0).num_microbatches * config.data.micro_batch_size
    steps = total_steps(config.trainer, sampler.steps_per_epoch)
    fact = (
        f"{config.data.path}: {prepared.num_prompts:,} prompts, {config.data.global_batch_size} a step, {steps:,} steps"
    )
    return rows, steps, fact


def _nearest(smallest: Plan | None, model: Matrices, gpus: int, card: Card, work: Work, keeping: Keeping) -> str:
    """Where nothing fits: the smallest number of GPUs with which something does."""
    need = "" if smallest is None else f": the smallest needs {smallest.total_memory / 1e9:.0f} GB"
    for more in (2, 4, 8, 16, 32, 64, 128):
        if plans(model, gpus * more, card, work, keeping)[0]:
            return (
                f"--gpus {gpus}: no layout fits in {HEADROOM:.0%} of one {card.name}{need}; --gpus {gpus * more} would."
            )
    return f"--gpus {gpus}: no layout fits in {HEADROOM:.0%} of one {card.name}{need}; use a card with more memory."
