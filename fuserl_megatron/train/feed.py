"""How a pass over a data set is put together: data sets, model, optimizer, batches with reference log-probabilities,
the numbers of each step. Training, evaluation, `fuserl parity` and the benchmarks begin here.

KTO compares with the log-ratio of *mismatched* pairs: each response under another prompt (the next one of the set),
the mean over the whole global batch. It is computed before the step by a forward-only pass over as many sequences again
(and reference scores of them): one forward pass more, about a third of a step's time, the same number in every layout.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fuserl_megatron.config.derived import row_settings
from fuserl_megatron.config.layout_rules import check_data_set
from fuserl_megatron.config.objective import open_loss, spec_of, uses_reference, with_loss_defaults
from fuserl_megatron.config.schema import Config, DataConfig, PackingConfig
from fuserl_megatron.convert.hf_config import ModelShape
from fuserl_megatron.convert.hf_io import check_weights
from fuserl_megatron.convert.peft import check_adapter
from fuserl_megatron.data.batch import PackedBatch
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.pairs import prepare
from fuserl_megatron.data.prepared import PreparedSet, mismatched
from fuserl_megatron.data.sampler import GlobalBatchSampler, StepPlan
from fuserl_megatron.data.too_long import fitted
from fuserl_megatron.mcore.lora import add_adapters
from fuserl_megatron.mcore.model import build_model, wrap_for_training
from fuserl_megatron.mcore.optimizer import build_optimizer
from fuserl_megatron.mcore.parallel import Layout
from fuserl_megatron.mcore.precision import parameter_dtype
from fuserl_megatron.mcore.step import Engine, score
from fuserl_megatron.metrics.run_log import say
from fuserl_megatron.objectives.batch_loss import StepValues
from fuserl_megatron.objectives.group_losses import kto_kl, wrpo_alpha
from fuserl_megatron.train.reference import LiveReference, Reference, stored_references
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import show

FOLDERS = ("reference", "reference_validation")
"""Where the reference's scores of the training set and of the held-out one lie in results_dir."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """A prepared set with its sampler; reference is None where the loss reads none."""

    prepared: PreparedSet
    sampler: GlobalBatchSampler
    directory: Path
    """Of the reference's stored scores (reference_mode=cache)."""
    reference: Reference | None = None
    mismatched: "Feed | None" = None
    """KTO: the same prompts' responses under other prompts."""

    def batches(self, plan: StepPlan, dp_rank: int) -> list[PackedBatch]:
        """One rank's micro-batches, reference log-probabilities filled in. Every rank calls it at the same time."""
        batches = self.sampler.micro_batches(plan, dp_rank)
        if self.reference is None:
            return batches
        scores = self.reference.scores(batches)
        return [replace(b, reference_logps_N=scores.lookup(b.response_ids_N)) for b in batches]


def open_run(config: Config, paths: Sequence[str | None]) -> tuple[Config, ModelShape, list[FusedDataset]]:
    """What can be looked at before the ranks meet: the run with its loss's defaults, the model's shape, the data sets.

    Raises:
        UserError: options that do not belong to the loss, no model or data set where one is named, or tokens that the
            model does not know.
    """
    config = with_loss_defaults(config)
    shape = check_weights(config.model.path)
    if config.objective.reference is not None:
        _check_reference(config, shape, check_weights(config.objective.reference))
    datasets = [FusedDataset(path) for path in paths if path is not None]
    check_adapter(shape, config.adapter)
    for dataset in datasets:
        check_data_set(str(dataset.path), shape, dataset.manifest)
    return config, shape, datasets


def _check_reference(config: Config, shape: ModelShape, reference: ModelShape) -> None:
    """The reference is computed by the target's model: a config that says otherwise would be passed over."""
    now, other = (dataclasses.asdict(replace(s, raw={}, dtype=None)) for s in (shape, reference))
    for field in now:
        if now[field] != other[field]:
            raise UserError(
                f"objective.reference={config.objective.reference}: its {field} is {show(other[field])}, that of "
                f"model.path {show(now[field])}: the reference must have the target's architecture."
            )


def make_engine(
    config: Config, layout: Layout, shape: ModelShape, source_names: Sequence[str], dtype: torch.dtype | None = None
) -> Engine:
    """The model without an optimizer, its weights yet to be loaded (an adapter's are there already); in dtype, or where
    None in trainer.precision's."""
    precision, loss = config.trainer.precision, open_loss(config, source_names)
    target = build_model(shape, config.model, layout, dtype or parameter_dtype(precision), precision)
    if config.adapter.kind == "lora":
        add_adapters(target, config.adapter, layout, config.run.seed)
    return Engine(
        target=target,
        layout=layout,
        loss=loss,
        metric_names=loss.metric_names,
        source_names=source_names,
        logprob_chunk_size=config.model.logprob_chunk_size,
    )


def with_optimizer(config: Config, engine: Engine) -> Engine:
    """The engine, its weights loaded, ready to train: chunks wrapped in DDP, and the optimizer of their parameters."""
    wrapped = wrap_for_training(engine.target, config.optim)
    optimizer = build_optimizer(wrapped, config.optim, config.trainer, parameter_dtype(config.trainer.precision))
    return replace(engine, wrapped=wrapped, optimizer=optimizer)


def make_feed(
    config: Config,
    dataset: FusedDataset,
    layout: Layout,
    folder: str = FOLDERS[0],
    fit: DataConfig | None = None,
) -> Feed:
    """Select, weigh and lay out a data set, without reference log-probabilities yet.

    `fit` are the rows by which data.on_too_long decides, where they are not those to be laid out.

    Raises:
        UserError: nothing is left, something does not fit, or the data lack what the loss reads.
    """
    rows = row_settings(config)
    prepared = fitted(prepare(dataset, config.objective, config.data.reward_temperature), fit or rows)
    if prepared.fitted is not None:
        names = ("prompts_too_long", "responses_cut_to_fit")
        counted = ", ".join(f"{name} {prepared.counts[name]:,}" for name in names)
        say(f"{dataset.path}: data.on_too_long={rows.on_too_long}: {counted}", layout.is_main)
    multiple = layout.pp_size if layout.vpp_size else 1

    def laid_out(prepared: PreparedSet, rows: DataConfig, folder: str, other: Feed | None = None) -> Feed:
        sampler = GlobalBatchSampler(prepared, rows, config.run.seed, layout.dp_size, multiple)
        directory = Path(config.run.results_dir) / folder
        return Feed(prepared=prepared, sampler=sampler, directory=directory, mismatched=other)

    if "kl" in step_inputs(config) and (view := mismatched(prepared)) is not None:
        alone = replace(rows, packing=PackingConfig(enabled=rows.packing.enabled, share_prefix="off"))
        return laid_out(prepared, rows, folder, laid_out(view, alone, f"{folder}_mismatched"))
    return laid_out(prepared, rows, folder)


def with_references(
    config: Config, engine: Engine, feeds: Sequence[Feed], between_batches: Callable[[], None] = lambda: None
) -> list[Feed]:
    """The feeds with reference log-probabilities.

    The engine's own weights are overwritten in modes cache and swap: load the policy's afterwards.
    """
    if not uses_reference(config.objective):
        return list(feeds)
    live = LiveReference(config, engine) if config.objective.reference_mode != "cache" else None
    stored = stored_references(config, engine, between_batches)

    def filled(feed: Feed) -> Feed:
        own = live or stored(feed.prepared, feed.sampler, feed.directory)
        return replace(feed, reference=own, mismatched=feed.mismatched and filled(feed.mismatched))

    return [filled(feed) for feed in feeds]


def step_inputs(config: Config) -> tuple[str, ...]:
    """What the loss needs, as its LossSpec names it."""
    return spec_of(config.objective).needs if config.objective.stage == "fusepo" else ()


def step_values(config: Config, engine: Engine, feed: Feed, plan: StepPlan, step: int, total: int) -> StepValues:
    """What the loss needs of the global batch of this step (counted from 0) beside the micro-batches."""
    needed = step_inputs(config)
    if "alpha" in needed:
        return StepValues(alpha=wrpo_alpha(step, total, config.objective.alpha_end or 0.0))
    if "kl" in needed:
        return StepValues(kl=_kto_kl(engine, feed.mismatched, plan))
    return StepValues()


def _kto_kl(engine: Engine, feed: Feed | None, plan: StepPlan) -> float:
    """KTO's reference point over the plan's prompts, in nats; 0 where a single prompt has no other."""
    if feed is None:
        return 0.0
    batches = feed.sampler.micro_batches(feed.sampler.plan(plan.prompts), engine.layout.dp_rank)
    ids_N, logps_N = score(engine, batches)
    order_N = ids_N.argsort()  # ranks hand in their parts in an order that depends on the layout
    assert feed.reference is not None
    reference_N = feed.reference.scores(batches).lookup(ids_N[order_N])
    return kto_kl(logps_N[order_N], reference_N).item()
