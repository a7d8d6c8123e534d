"""Every layout that fits a number of GPUs, with its memory and time, the fastest first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fuserl_megatron.plan.cards import Card
from fuserl_megatron.plan.memory import Keeping, memory_bytes
from fuserl_megatron.plan.step_time import Layout, Matrices, Work, mfu, step_seconds

ALIKE = 0.04
"""Steps whose times differ by less are alike: the model of time is not better. Of those the simpler layout is first."""
HEADROOM = 0.95
"""Share of a card's memory that a plan may take."""


@dataclass(frozen=True)
class Plan:
    """One layout and what it costs."""

    layout: Layout
    memory: dict[str, float]
    """Bytes on the fullest GPU, by part."""
    seconds: dict[str, float]
    """Of a step, by part."""
    mfu: float

    @property
    def total_memory(self) -> float:
        """Bytes."""
        return sum(self.memory.values())

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())


def layouts(model: Matrices, gpus: int, card: Card, work: Work) -> Iterator[Layout]:
    """Layouts that core takes: TP inside a node and dividing heads and groups, PP dividing layers, CP dividing rows."""
    for tp in _divisors(min(gpus, card.per_node)):
        if gpus % tp or model.groups % tp or model.heads % tp or model.channels % tp:
            continue
        for pp in _divisors(model.layers):
            if gpus % (tp * pp):
                continue
            for cp in (1, 2, 4, 8):
                if gpus % (tp * pp * cp) or work.length % (2 * cp * tp):
                    continue
                dp = gpus // (tp * pp * cp)
                if dp > work.rows:
                    continue
                for vpp in _virtual(model.layers // pp) if pp > 1 else [1]:
                    if vpp > 1 and -(-work.rows // dp) % pp:  # core wants whole rounds of micro-batches
                        continue
                    for recompute in ("none", "full"):
                        yield Layout(gpus, tp, pp, cp, vpp, recompute)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _virtual(layers: int) -> list[int]:
    return [d for d in _divisors(layers) if d <= 8]


def plans(model: Matrices, gpus: int, card: Card, work: Work, keeping: Keeping) -> tuple[list[Plan], Plan | None]:
    """Those that fit, the fastest first; and, where none does, the one that needs the least memory."""
    fitting, smallest = [], None
    for layout in layouts(model, gpus, card, work):
        memory = memory_bytes(model, layout, keeping)
        plan = Plan(layout, memory, step_seconds(model, layout, work, card), mfu(model, layout, work, card))
        if smallest is None or plan.total_memory < smallest.total_memory:
            smallest = plan
        if plan.total_memory <= HEADROOM * card.memory:
            fitting.append(plan)
    best = min((plan.step for plan in fitting), default=1.0)

    def order(plan: Plan) -> tuple[float, ...]:
        layout = plan.layout
        alike = math.floor(math.log(plan.step / best) / math.log(1 + ALIKE))
        return alike, layout.pp * layout.cp, layout.vpp, layout.recompute == "full", layout.tp, plan.step

    fitting.sort(key=order)
    return fitting, None if fitting else smallest


def overrides(layout: Layout, card_format: str) -> list[str]:
    """What to type for a layout."""
    found = [
        f"model.tensor_model_parallel_size={layout.tp}",
        f"model.pipeline_model_parallel_size={layout.pp}",
        f"model.context_parallel_size={layout.cp}",
    ]
    if layout.tp > 1:
        found.append("model.sequence_parallel=true")
    if layout.vpp > 1:
        found.append(f"model.virtual_pipeline_model_parallel_size={layout.vpp}")
    found.append(f"model.recompute_granularity={layout.recompute}")
    return [
        "trainer=gpu",
        "optim=distributed",
        *found,
        *(["trainer.precision=fp8_current"] if card_format == "fp8" else []),
    ]
