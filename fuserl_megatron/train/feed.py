"""What a pass over a data set needs at hand: its batches, their reference log-probabilities, the numbers of each step.

KTO compares with the log-ratio of *mismatched* pairs: each response under another prompt (the next one of the set),
the mean over the whole global batch. It is computed before the step by a forward-only pass over as many sequences again
(and reference scores of them): one forward pass more, about a third of a step's time, the same number in every layout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fuserl_megatron.config.facts import row_length
from fuserl_megatron.config.objective import uses_reference
from fuserl_megatron.config.schema import Config, DataConfig, PackingConfig
from fuserl_megatron.data.batch import PackedBatch
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.pairs import prepare
from fuserl_megatron.data.prepared import PreparedSet, mismatched
from fuserl_megatron.data.sampler import GlobalBatchSampler, StepPlan
from fuserl_megatron.mcore.losses import StepValues
from fuserl_megatron.mcore.step import Engine, score
from fuserl_megatron.objectives.group_losses import kto_kl, wrpo_alpha
from fuserl_megatron.train.reference import LiveReference, Reference, stored_references


@dataclass(frozen=True, kw_only=True)
class Feed:
    """A prepared set with its sampler; reference is None where the loss reads none."""

    prepared: PreparedSet
    sampler: GlobalBatchSampler
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


def make_feed(config: Config, dataset: FusedDataset, dp_size: int, pp_multiple: int) -> Feed:
    """Select, weigh and lay out a data set, without reference log-probabilities yet.

    Raises:
        UserError: nothing is left, something does not fit, or the data lack what the loss reads.
    """
    prepared = prepare(dataset, config.objective, config.data.reward_temperature)
    rows = replace(config.data, seq_length=row_length(config))
    sampler = GlobalBatchSampler(prepared, rows, config.run.seed, dp_size, microbatch_multiple=pp_multiple)
    other = None
    if config.objective.loss == "kto" and (view := mismatched(prepared)) is not None:
        data: DataConfig = replace(rows, packing=PackingConfig(enabled=config.data.packing.enabled, share_prefix="off"))
        other = Feed(prepared=view, sampler=GlobalBatchSampler(view, data, config.run.seed, dp_size, pp_multiple))
    return Feed(prepared=prepared, sampler=sampler, mismatched=other)


def with_references(
    config: Config,
    engine: Engine,
    feeds: Sequence[tuple[Feed, Path]],
    between_batches: Callable[[], None] = lambda: None,
) -> list[Feed]:
    """The feeds with reference log-probabilities (each with the directory its stored ones lie in).

    The engine's own weights are overwritten in modes cache and swap: load the policy's afterwards.
    """
    if not uses_reference(config.objective):
        return [feed for feed, _ in feeds]
    if config.objective.reference_mode in ("resident", "swap"):
        live = LiveReference(config, engine)
        return [_filled(feed, live, live) for feed, _ in feeds]
    jobs = [(feed.prepared, feed.sampler, directory) for feed, directory in feeds]
    jobs += [
        (feed.mismatched.prepared, feed.mismatched.sampler, directory.with_name(f"{directory.name}_mismatched"))
        for feed, directory in feeds
        if feed.mismatched
    ]
    stored = stored_references(config, engine, jobs, between_batches)
    others = iter(stored[len(feeds) :])
    return [_filled(feed, own, next(others) if feed.mismatched else None) for (feed, _), own in zip(feeds, stored)]  # noqa: B905


def _filled(feed: Feed, own: Reference, other: Reference | None) -> Feed:
    return replace(feed, reference=own, mismatched=feed.mismatched and replace(feed.mismatched, reference=other))


def step_values(config: Config, engine: Engine, feed: Feed, plan: StepPlan, step: int, total: int) -> StepValues:
    """What the loss needs of the global batch of this step (counted from 0) beside the micro-batches."""
    if config.objective.loss == "wrpo":
        return StepValues(alpha=wrpo_alpha(step, total, config.objective.alpha_end))
    if config.objective.loss == "kto":
        return StepValues(kl=_kto_kl(engine, feed.mismatched, plan))
    return StepValues()


def _kto_kl(engine: Engine, feed: Feed | None, plan: StepPlan) -> float:
    """KTO's reference point over the plan's prompts, in nats; 0 where a single prompt has no other."""
    if feed is None:
        return 0.0
    batches = feed.sampler.micro_batches(feed.sampler.plan_of(plan.prompts), engine.layout.dp_rank)
    ids_N, logps_N = score(engine, batches)
    order_N = ids_N.argsort()  # ranks hand in their parts in an order that depends on the layout
    reference_N = feed.reference.scores(batches).lookup(ids_N[order_N])
    return kto_kl(logps_N[order_N], reference_N).item()
