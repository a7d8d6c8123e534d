"""One optimizer step, and one scoring pass, through core's pipeline schedule.

The one scaling rule: each micro-batch's loss is a plain sum over its items, divided by a normaliser that was counted
over the whole global batch before the schedule started (prompts, or weighted tokens). The loss closure returns core's
3-tuple with an integer zero, so core adds no scaling of its own, and gradients add up over micro-batches and
data-parallel ranks. Nothing is ever divided by a local count, so the layout cannot change the result.

Shapes: B rows, S tokens per row (of this rank, with context parallelism), T scored tokens, N sequences, P pairs,
H hidden, M metrics.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from fuserl_megatron.data.batch import PackedBatch
from fuserl_megatron.mcore import cpu
from fuserl_megatron.mcore.attention import attention_argument
from fuserl_megatron.mcore.context import context_part, sum_over_context
from fuserl_megatron.mcore.logprob import vocab_parallel_logps
from fuserl_megatron.mcore.model import TargetModel
from fuserl_megatron.mcore.optimizer import clip_and_update, gradient_norm, set_learning_rate
from fuserl_megatron.mcore.parallel import Layout
from fuserl_megatron.mcore.precision import scoring
from fuserl_megatron.mcore.visibility import Visibility
from fuserl_megatron.objectives import reduce
from fuserl_megatron.objectives.logps import sequence_logps
from fuserl_megatron.runtime.collectives import any_rank, from_all_ranks, on_any_rank
from fuserl_megatron.util.timer import Clock


class NonFiniteError(RuntimeError):
    """Loss or gradient is NaN or infinite; raised on every rank, before the weights are touched."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What a step needs; `wrapped` (core's DDP) and `optimizer` stay empty where a model only scores."""

    target: TargetModel
    layout: Layout
    loss: Callable[[torch.Tensor, PackedBatch, Any], tuple[torch.Tensor, dict[str, reduce.SumCount]]]
    """From log pi [N], the batch and the step's values to the undivided loss and its metrics."""
    metric_names: Sequence[str]
    """All that `loss` may give, in one order."""
    source_names: Sequence[str]
    logprob_chunk_size: int
    place: Callable[[int], str] = str
    """Where a response was read, for messages: file:line of its id."""
    wrapped: list = field(default_factory=list)
    optimizer: Any = None
    clock: Clock = field(default_factory=Clock)

    @property
    def callables(self) -> list:
        """The chunks as the schedule calls them."""
        return self.wrapped or self.target.chunks


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Metrics of one step, equal on all ranks: name -> mean (NaN where nothing was counted)."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    stop: bool
    """Whether `stop_wanted` was true on any rank."""


def _hidden_to_token_logps(engine: Engine, hidden_BSH: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """[B, S (or S/TP under sequence parallelism), H] -> log-probabilities [T] of the scored tokens, in row order."""
    layout, target = engine.layout, engine.target
    group = ps.get_tensor_model_parallel_group()
    if target.config.sequence_parallel:
        # the backward of this gather sums the ranks' partial gradients and scatters them
        hidden_SBH = gather_from_sequence_parallel_region(hidden_BSH.transpose(0, 1).contiguous(), True)
        hidden_BSH = hidden_SBH.transpose(0, 1)
    else:
        hidden_BSH = copy_to_tensor_model_parallel_region(hidden_BSH)
    rows = target.padded_vocab // layout.tp_size
    first_row = rows * layout.tp_rank
    return vocab_parallel_logps(
        batch.scored(hidden_BSH),
        target.output_weight(),
        batch.scored(batch.labels_BS),
        first_row=first_row,
        num_valid=min(max(target.shape.vocab_size - first_row, 0), rows),
        group=group,
        chunk_size=engine.logprob_chunk_size,
        rule=target.logit_rule,
    )


def batch_logps(engine: Engine, output: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Summed log-probability [N] of each sequence of the batch, float64, over all context-parallel ranks."""
    token_logps_T = _hidden_to_token_logps(engine, output, batch)
    logps_N = sequence_logps(token_logps_T, batch.scored(batch.sequence_ids_BS), batch.num_sequences)
    if engine.layout.cp_size > 1:
        logps_N = sum_over_context(logps_N, ps.get_context_parallel_group())
    return logps_N


def _run_schedule(engine: Engine, batches: Sequence[PackedBatch], on_output, forward_only: bool) -> list:
    """Core's schedule over this rank's micro-batches; on_output(output, batch) runs on the last stage."""
    device, cp_size, cp_rank = engine.layout.device, engine.layout.cp_size, engine.layout.cp_rank
    config, backend = engine.target.config, engine.target.attention_backend
    width = config.num_attention_heads * config.kv_channels // engine.layout.tp_size
    kept: list[Visibility] = []  # what the layers were handed, until every backward pass is done

    def forward_step(iterator, model):
        batch = next(iterator)
        visible = Visibility(batch.segment_ids_BS, batch.parent_ids_BS, device, cp_size, cp_rank, batch.positions_BS)
        for earlier in kept:
            earlier.forget()
        kept.append(visible)
        mask = attention_argument(visible, backend, width, engine.target.layers_alike)
        batch = (context_part(batch, cp_size, cp_rank) if cp_size > 1 else batch).to(device)
        core_model = model.module if engine.wrapped else model
        core_model.rotary_pos_emb.positions_BS = batch.positions_BS
        with cpu.no_requests():
            output = model(batch.tokens_BS, batch.positions_BS, mask)
        return output, partial(on_output, batch=batch)

    chunks = engine.callables
    rows, tokens = batches[0].tokens_BS.shape
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=tokens,
        micro_batch_size=rows,
        forward_only=forward_only,
    )


def forward_backward(
    engine: Engine,
    batches: Sequence[PackedBatch],
    normalizer: float,
    values: Any,
) -> tuple[float, dict[str, float]]:
    """Gradients of one global batch into the DDP buffers. Returns the loss and the metrics, equal on all ranks.

    Every data-parallel rank has as many micro-batches; normalizer is the prompts (or weighted tokens) of all of them;
    values are handed to the loss as they are.

    Raises:
        NonFiniteError: on every rank, naming the rank, micro-batch and prompts of the loss that is not finite.
    """
    for chunk in engine.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    if engine.optimizer is not None:
        engine.optimizer.zero_grad()
    totals_M2 = _losses_and_metrics(engine, batches, normalizer, values, forward_only=False)
    return reduced(engine, totals_M2)


@torch.no_grad()
def evaluate(engine: Engine, batches: Sequence[PackedBatch], values: Any) -> torch.Tensor:
    """This rank's part of a batch's undivided loss and of its metrics, no gradients; add parts up, then call `reduced`.

    Raises:
        NonFiniteError: as `forward_backward`.
    """
    for chunk in engine.callables:
        chunk.eval()
    with scoring(engine.target.config):
        return _losses_and_metrics(engine, batches, 1.0, values, forward_only=True)


def reduced(engine: Engine, totals_M2: torch.Tensor) -> tuple[float, dict[str, float]]:
    """Loss and metrics by name over all ranks (one collective), equal on all."""
    dist.all_reduce(totals_M2)
    metrics = dict(zip(engine.metric_names, reduce.means(totals_M2[1:]).tolist(), strict=True))
    return totals_M2[0, 0].item(), metrics


def _losses_and_metrics(
    engine: Engine, batches: Sequence[PackedBatch], normalizer: float, values: Any, forward_only: bool
) -> torch.Tensor:
    """Runs the schedule; row 0 is the loss, the others the metrics (sum, count); zeros on ranks that do not report."""

    def on_output(output, batch):
        logps_N = batch_logps(engine, output, batch)
        total, metrics = engine.loss(logps_N, batch, values)
        loss = total / normalizer
        row = torch.stack([loss.detach(), loss.new_ones(())])
        report = torch.cat([row[None], reduce.stack(metrics, engine.metric_names)])
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), report

    reports = _run_schedule(engine, batches, on_output, forward_only)
    _stop_if_not_finite(engine, reports, batches)
    totals_M2 = torch.zeros(len(engine.metric_names) + 1, 2, dtype=torch.float64, device=engine.layout.device)
    if engine.layout.is_last_stage and engine.layout.tp_rank == 0 and engine.layout.cp_rank == 0:
        totals_M2 += torch.stack(reports).sum(0)
    return totals_M2


def _stop_if_not_finite(engine: Engine, reports: list, batches: Sequence[PackedBatch]) -> None:
    bad = []
    if reports:
        finite = torch.stack(reports)[:, 0, 0].isfinite().tolist()
        bad = [i for i, ok in enumerate(finite) if not ok]
    if any_rank(bool(bad), engine.layout.device):
        raise NonFiniteError(f"the loss is not finite: {_named_everywhere(engine, batches, bad)}")


def _named_everywhere(engine: Engine, batches: Sequence[PackedBatch], which: Sequence[int]) -> str:
    """The sequences in those micro-batches of every rank. All ranks call it."""
    mine = [
        f"rank {engine.layout.rank}, micro-batch {i}, prompts {sorted(set(batches[i].prompt_ids_N.tolist()))}, "
        f"responses {_named(batches[i], engine)}"
        for i in which
    ]
    return "; ".join(itertools.chain(*from_all_ranks(mine)))


def _named(batch: PackedBatch, engine: Engine) -> str:
    """The responses of a batch, the source of each and where it was read: 4 of alpha (a.jsonl:5), 7 of beta (...)."""
    pairs = zip(batch.response_ids_N.tolist(), batch.source_ids_N.tolist(), strict=True)
    return "[" + ", ".join(f"{i} of {engine.source_names[source]} ({engine.place(i)})" for i, source in pairs) + "]"


def train_step(
    engine: Engine,
    batches: Sequence[PackedBatch],
    *,
    normalizer: float,
    values: Any,
    lr: float,
    weight_decay: float,
    max_norm: float,
    check: Callable[[float], None],
    stop_wanted: Callable[[], bool],
) -> StepResult:
    """One optimizer step over a global batch. All ranks call it with their own micro-batches.

    Raises:
        NonFiniteError: loss or gradient not finite; the weights are those from before the step (also when `check`,
            which is given the loss, raises).
    """
    with engine.clock.part("forward_backward"):
        loss, metrics = forward_backward(engine, batches, normalizer, values)
    check(loss)
    with engine.clock.part("optimizer"):
        norm = gradient_norm(engine.optimizer)
    infinite, stop = on_any_rank([not (norm < float("inf")), stop_wanted()], engine.layout.device)
    if infinite:
        # it is summed over the ranks by now: any of the sequences may be the one
        own = engine.layout.is_last_stage and engine.layout.tp_rank == engine.layout.cp_rank == 0
        named = _named_everywhere(engine, batches, [i for i, b in enumerate(batches) if own and b.num_sequences])
        raise NonFiniteError(f"the gradient is not finite (norm {norm}), every loss is; one of {named}")
    with engine.clock.part("optimizer"):
        set_learning_rate(engine.optimizer, lr, weight_decay)
        clip_and_update(engine.optimizer, norm, max_norm)
    return StepResult(loss=loss, grad_norm=norm, metrics=metrics, stop=stop)


@torch.no_grad()
def score(engine: Engine, batches: Sequence[PackedBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probabilities of all sequences of all ranks' micro-batches, on every rank.

    Returns:
        response ids int64 [N] and log-probabilities float64 [N], in no particular order.
    """

    def on_output(output, batch):
        logps_N = batch_logps(engine, output, batch)
        return logps_N.sum(), torch.zeros((), dtype=torch.int, device=logps_N.device), (batch.response_ids_N, logps_N)

    for chunk in engine.callables:
        chunk.eval()
    with scoring(engine.target.config):
        found = _run_schedule(engine, batches, on_output, forward_only=True)
    mine = None
    if found and engine.layout.tp_rank == 0 and engine.layout.cp_rank == 0:
        mine = (torch.cat([ids for ids, _ in found]).cpu(), torch.cat([logps for _, logps in found]).cpu())
    parts = [part for part in from_all_ranks(mine) if part is not None]
    return torch.cat([ids for ids, _ in parts]), torch.cat([logps for _, logps in parts])
