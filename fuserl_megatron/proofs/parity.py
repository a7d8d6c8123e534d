"""`fuserl parity`: are loss and gradients of a run's layout those of one plain process in float64?

Two computations of the same global batches, from the same weights, without an optimizer step between them:

    layout   the run's own TP, PP, DP, precision, packing, micro-batches, prefix sharing, recompute; all ranks
    alone    rank 0 as a world of one: float64, every sequence in a row of its own, no recompute, no DDP

The second shares the model's and the losses' code with the first and nothing of what a layout adds: that is what is
asked; tests/distributed/test_layouts.py holds that code against transformers and plain formulas. Gradients are whole:
no distributed optimizer, no overlap. Reference scores are computed live: results_dir is not touched.
"""

import dataclasses
import gc
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from fuserl_megatron.config.derived import row_settings
from fuserl_megatron.config.objective import uses_reference
from fuserl_megatron.config.schema import Config, DataConfig, ModelConfig, PackingConfig
from fuserl_megatron.convert.hf_config import ModelShape
from fuserl_megatron.data.assemble import parts_of
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.pairs import prepare
from fuserl_megatron.data.too_long import fitted
from fuserl_megatron.mcore import lora, parallel, weights
from fuserl_megatron.mcore.optimizer import gradient_norm
from fuserl_megatron.mcore.step import NonFiniteError, forward_backward
from fuserl_megatron.metrics.run_log import say
from fuserl_megatron.runtime import collectives
from fuserl_megatron.train.feed import make_engine, make_feed, open_run, step_values, with_optimizer, with_references
from fuserl_megatron.train.summary import num_parameters
from fuserl_megatron.util.errors import UserError

THRESHOLDS = {"32": 1e-5, "bf16": 0.2}
"""Largest relative error that passes by trainer.precision; docs/parallelism.md has the figures behind it."""
# fmt: off
# parameter group -> parts of its Hugging Face tensors' names
GROUPS = {"embedding": ("embed_tokens",), "qkv": ("q_proj", "k_proj", "v_proj"), "proj": ("o_proj",),
          "fc1": ("gate_proj", "up_proj"), "fc2": ("down_proj",), "norms": ("norm",), "output": ("lm_head",)}
# fmt: on
Step = tuple[float, float, Iterable[tuple[str, torch.Tensor]]]
"""Loss; gradient norm as training clips by it (NaN alone); gradients by Hugging Face name (on rank 0)."""
Collected = tuple[float, float, dict[str, torch.Tensor]]
"""The same, all gradients at hand."""


def parity(config: Config, *, steps: int = 1, threshold: float | None = None) -> int:
    """Compare a run's layout with one float64 process on its first global batches; rank 0 prints a table.

    Every rank calls it; rank 0 computes alone when the process groups are gone and the other ranks are done.

    Args:
        config: the run.
        steps: global batches compared; the weights stay as they are.
        threshold: largest relative error that passes; None takes THRESHOLDS.

    Returns:
        0; 1 on rank 0 past the threshold, on every rank when a loss is not finite.

    Raises:
        UserError: settings, ranks, model or data do not fit; the model is too large for float64 here.
    """
    config, shape, (dataset,) = open_run(config, [config.data.path])
    config = _compared(config)
    layout = parallel.initialize(config.model, config.trainer)
    try:
        _check_memory(config, shape, steps, layout)
        compared = _steps(config, layout, shape, dataset, steps)
        found = [(loss, norm, dict(gradients)) for loss, norm, gradients in compared]
    except NonFiniteError as error:
        say(str(error), layout.is_main)
        return 1
    finally:
        parallel.shutdown()
    if not layout.is_main:
        return 0
    gc.collect()  # DDP's buffers and hooks refer to each other
    torch.cuda.empty_cache()
    rows = _worst(found, _alone(config, shape, dataset, layout.device.type == "cuda", steps))
    say(f"layout   {layout.describe()}, precision {config.trainer.precision}, global batches: {steps}")
    say("alone    one process, float64, a row for each sequence (both: no distributed optimizer, no overlap)\n")
    return _report(rows, THRESHOLDS[config.trainer.precision] if threshold is None else threshold)


def _compared(config: Config) -> Config:
    """The run without what splits, defers or stores its numbers."""
    switches = ("use_precision_aware_optimizer", "use_distributed_optimizer", "overlap_grad_reduce")
    whole: dict[str, Any] = dict.fromkeys((*switches, "overlap_param_gather"), False)
    objective = config.objective
    if uses_reference(objective):
        objective = dataclasses.replace(objective, reference_mode="swap")
    if config.trainer.precision.startswith("fp8"):  # what a layout does to the numbers does not depend on it
        config = dataclasses.replace(
            config,
            trainer=dataclasses.replace(config.trainer, precision="bf16"),
            model=dataclasses.replace(config.model, fp8_params=False),
        )
    return dataclasses.replace(config, objective=objective, optim=dataclasses.replace(config.optim, **whole))


def _alone(config: Config, shape: ModelShape, dataset: FusedDataset, on_gpu: bool, steps: int) -> Iterator[Step]:
    """Rank 0's own computation, in a world of one that meets nobody."""
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = ModelConfig(path=config.model.path, transformer_impl="local")
    try:
        layout = parallel.initialize(model, config.trainer)
        rows = row_settings(config)
        prepared = fitted(prepare(dataset, config.objective, config.data.reward_temperature), rows)
        parts = (part for prompt in range(prepared.num_prompts) for part in parts_of(prepared, prompt, False))
        positions_N = np.repeat(prepared.prompt_lengths, np.diff(prepared.sequence_offsets)) + prepared.lengths
        data = dataclasses.replace(
            config.data,
            packing=PackingConfig(enabled=False, share_prefix="off"),
            micro_batch_size=max(len(part.sequences) for part in parts),
            seq_length=int(positions_N.max()),
        )
        plain = dataclasses.replace(config, model=model, data=data)
        yield from _steps(plain, layout, shape, dataset, steps, torch.float64, rows)
    finally:
        parallel.shutdown()


def _steps(
    config: Config,
    layout: parallel.Layout,
    shape: ModelShape,
    dataset: FusedDataset,
    steps: int,
    dtype: torch.dtype | None = None,
    fit: DataConfig | None = None,
) -> Iterator[Step]:
    """The first global batches. dtype float64: plain gradients, without DDP; None: the run's, through DDP."""
    engine = make_engine(config, layout, shape, dataset.sources, dtype)
    (feed,) = with_references(config, engine, [make_feed(config, dataset, layout, fit=fit)])
    target = engine.target
    weights.load_hf_weights(target, config.model.path, layout)
    if dtype is None:
        engine = with_optimizer(config, engine)
    for plan in map(feed.sampler.step, range(steps)):
        batches = feed.batches(plan, layout.dp_rank)
        values = step_values(config, engine, feed, plan, 1, 2)  # half-way: WRPO's source response takes part
        for part in target.chunks:
            part.zero_grad()
        loss = forward_backward(engine, batches, plan.normalizer(config.objective.nll_reduction), values)[0]
        norm = gradient_norm(engine.optimizer) if engine.optimizer else math.nan
        adapted = bool(lora.adapters_of(target))
        gather = lora.gather_adapters(target, layout, _gradient).items if adapted else None
        yield loss, norm, gather() if gather else weights.gather_hf_tensors(target, layout, _gradient)


def _gradient(parameter: Any) -> torch.Tensor:
    """DDP's fp32 sum, a copy because the next step clears its buffer; what autograd left where there is no DDP."""
    return parameter.main_grad.clone() if hasattr(parameter, "main_grad") else parameter.grad


def _check_memory(config: Config, shape: ModelShape, steps: int, layout: parallel.Layout) -> None:
    """Rank 0 decides for all, before a model is built."""
    parameters = num_parameters(shape)
    # float64: weights, gradients, the reference's weights; fp32: the layout's gradients
    needed = parameters * (8 * (3 if uses_reference(config.objective) else 2) + 4 * steps)
    on_cpu = layout.device.type == "cpu"
    free = psutil.virtual_memory().available if on_cpu else torch.cuda.mem_get_info(layout.device)[0]
    free = collectives.from_main_rank(free, layout.device)
    if needed > free:
        raise UserError(
            f"model.path={config.model.path}: {parameters:,} parameters need {needed / 1e9:.1f} GB in float64, rank 0 "
            f"has {free / 1e9:.1f} GB: compare with a smaller model of the same family in the same layout."
        )


def _relative(difference: float, size: float) -> float:
    """NaN counts as infinite, and so does any difference from zero."""
    error = 0.0 if difference == 0 else abs(difference) / size if size else math.inf
    return math.inf if math.isnan(error) else error


def _worst(layout: Iterable[Collected], alone: Iterable[Step]) -> dict[str, tuple[float, str]]:
    """For loss, gradient norm and each group: max|a - e| / max|e|, the worst over tensors and steps, and its place."""
    rows: dict[str, tuple[float, str]] = {}
    for (loss, norm, gradients), (expected_loss, _, expected_gradients) in zip(layout, alone, strict=True):
        errors, squares = [], 0.0
        for name, expected in expected_gradients:
            group = next(group for group, parts in GROUPS.items() if any(part in name for part in parts))
            difference = (gradients[name].double() - expected.cpu()).abs().max().item()
            errors.append((group, _relative(difference, expected.abs().max().item()), name))
            squares += expected.square().sum().item()
        for name, a, e in (("loss", loss, expected_loss), ("gradient norm", norm, math.sqrt(squares))):
            errors.append((name, _relative(a - e, abs(e)), f"{a:.9g}, alone {e:.9g}"))
        for row, error, where in errors:
            if row not in rows or error > rows[row][0]:
                rows[row] = (error, where)
    return rows


def _report(rows: dict[str, tuple[float, str]], threshold: float) -> int:
    """Prints the table; 1 when an error is past the threshold."""
    say(f"{'what':<14}{'worst relative error':<22}where")
    for row in ("loss", "gradient norm", *(group for group in GROUPS if group in rows)):
        error, where = rows[row]
        say(f"{row:<14}{error:<22.1e}{where}{'' if error <= threshold else '   <-- past the threshold'}")
    worst = max(rows.values())[0]
    verdict = "the layout gives" if worst <= threshold else "THE LAYOUT DOES NOT GIVE"
    say(f"\n{verdict} the numbers of one process: worst error {worst:.1e}, threshold {threshold:g}")
    return 0 if worst <= threshold else 1
