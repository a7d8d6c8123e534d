"""Which settings of `objective` belong together: options per stage and loss, and the defaults of those left null.

What each loss reads stands in its `LossSpec` (objectives/); nothing is repeated here. The table of losses is imported
inside the functions, for it brings torch.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from fuserl_megatron.config.schema import Config, ObjectiveConfig
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.named import is_named, load_named
from fuserl_megatron.util.text import nearest, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fuserl_megatron.objectives.batch_loss import BatchLoss, Metric
    from fuserl_megatron.objectives.spec import LossSpec

OF_STAGE = {
    "fusesft": ("selection", "top_m", "nll_reduction"),
    "fusepo": tuple(
        field.name
        for field in dataclasses.fields(ObjectiveConfig)
        if field.name not in ("stage", "selection", "top_m", "nll_reduction")
    ),
}
DEFAULT_TOP_M = 4
TAKEN = ("step", "epoch", "loss", "grad_norm", "lr")
"""Names in a line of metrics.jsonl that are none of the loss."""
EXAMPLES = {"label_smoothing": 0.1, "target_source": "llama-3.1-8b-instruct"}


def check_objective(objective: ObjectiveConfig) -> None:
    """The rules between the objective's settings.

    Raises:
        UserError: an option that the stage or loss does not use, a required one missing, a value out of range.
    """
    for stage, names in OF_STAGE.items():
        for name in names if stage != objective.stage else ():
            rule = f"belongs to objective.stage={stage}, and this run's stage is {objective.stage}"
            _refuse_given(objective, name, rule)
    if objective.selection != "top_m":
        _refuse_given(objective, "top_m", "is used with objective.selection=top_m only")
    if objective.stage == "fusepo":
        _check_loss(objective)


def spec_of(objective: ObjectiveConfig) -> LossSpec:
    """The loss that objective.loss names, the package's or a user's own.

    Raises:
        UserError: there is no such loss, with the nearest name, or it cannot be imported.
    """
    from fuserl_megatron.objectives import LOSSES, LossSpec

    name = objective.loss
    if name is None:
        raise UserError("objective.loss=null: objective.stage=fusepo needs a loss; objective.loss=ln_dpo would work.")
    if is_named(name):
        found = load_named(name, "objective.loss")
        if not isinstance(found, LossSpec):
            what = f"is a {type(found).__name__}, not a fuserl_megatron.objectives.LossSpec (docs/extending.md)"
            raise UserError(f"objective.loss={name}: {what}.")
        return found
    if name not in LOSSES:
        raise UserError(f"objective.loss={show(name)}: not one of {', '.join(LOSSES)}.{nearest(name, LOSSES)}")
    return LOSSES[name]


def loss_options(objective: ObjectiveConfig) -> dict[str, Any]:
    """The options of the loss that are set, by name."""
    given = {name: getattr(objective, name, None) for name in spec_of(objective).options}
    return {name: value for name, value in given.items() if value is not None} | objective.loss_kwargs


def open_loss(config: Config, sources: Sequence[str]) -> BatchLoss:
    """The loss of a run over these sources, its options resolved once, with the user's metrics: the engine calls it.

    Raises:
        UserError: the loss or a metric is not there, or a metric has the name of another.
    """
    from fuserl_megatron.objectives import batch_loss

    objective = config.objective
    if objective.stage == "fusesft":
        loss = batch_loss.sft_loss(objective.nll_reduction or "token_mean", sources)
    else:
        spec = spec_of(objective)
        loss = batch_loss.preference_loss(spec, spec.complete(loss_options(objective)), sources)
    metrics: dict[str, Metric] = {}
    for name in config.exp_manager.metrics:
        short = name.rpartition(":")[2].rpartition(".")[2]
        if short in (*TAKEN, *loss.metric_names, *metrics):
            raise UserError(f"exp_manager.metrics={name}: there is a metric {short} already; rename yours.")
        metrics[short] = load_named(name, "exp_manager.metrics")
        if not callable(metrics[short]):
            raise UserError(f"exp_manager.metrics={name}: is no function (docs/extending.md).")
    return batch_loss.with_metrics(loss, metrics) if metrics else loss


def with_defaults(objective: ObjectiveConfig) -> ObjectiveConfig:
    """The objective with every null field that its stage and loss read filled from their defaults.

    Raises:
        UserError: a required option is missing, or one is set that the loss does not read.
    """
    if objective.stage == "fusesft":
        selection = objective.selection or "per_source"
        chosen: dict[str, Any] = dict(selection=selection, nll_reduction=objective.nll_reduction or "token_mean")
        if selection == "top_m":
            chosen["top_m"] = objective.top_m or DEFAULT_TOP_M
        return dataclasses.replace(objective, **chosen)
    check_objective(objective)
    options = spec_of(objective).complete(loss_options(objective))
    fields = {name: value for name, value in options.items() if name in OF_STAGE["fusepo"]}
    fields["loss_kwargs"] = {name: value for name, value in options.items() if name not in fields}
    if uses_reference(objective):
        fields["reference_mode"] = objective.reference_mode or "cache"
    return dataclasses.replace(objective, **fields)


def with_loss_defaults(config: Config) -> Config:
    """The run with its objective's null fields filled; see `with_defaults`."""
    objective = with_defaults(config.objective)
    if objective.reference_mode is not None:
        objective = dataclasses.replace(objective, reference_mode=reference_mode(config))
    return dataclasses.replace(config, objective=objective)


def reference_mode(config: Config) -> Literal["cache", "resident", "swap", "adapter"]:
    """How the reference's scores are had, for a loss that reads them."""
    objective = config.objective
    free = config.adapter.kind == "lora" and objective.reference is None
    return objective.reference_mode or ("adapter" if free else "cache")


def uses_reference(objective: ObjectiveConfig) -> bool:
    """Whether reference log-probabilities are read at all."""
    if objective.stage == "fusesft":
        return False
    spec = spec_of(objective)
    return spec.uses_reference({**spec.defaults, **loss_options(objective)})


def _check_loss(objective: ObjectiveConfig) -> None:
    from fuserl_megatron.objectives import LOSSES
    from fuserl_megatron.objectives.spec import Unit

    spec = spec_of(objective)
    for name in OF_STAGE["fusepo"]:
        users = [other.name for other in LOSSES.values() if name in other.options]
        if users and name not in spec.options:
            _refuse_given(objective, name, f"loss {spec.name} does not use it ({', '.join(users)} would)")
    for name in objective.loss_kwargs:
        if name in OF_STAGE["fusepo"]:
            raise UserError(f"objective.loss_kwargs.{name}: is a setting of its own; write objective.{name}=...")
    for name, default in spec.defaults.items():
        if default is None and loss_options(objective).get(name) is None:
            _refuse_missing(spec, name)
    try:
        spec.complete(loss_options(objective))
    except ValueError as error:
        raise UserError(f"objective: {error}") from None
    if spec.unit is Unit.TRIPLES and objective.target_source is None:
        _refuse_missing(spec, "target_source")
    if spec.unit is not Unit.TRIPLES:
        users = [other.name for other in LOSSES.values() if other.unit is Unit.TRIPLES]
        _refuse_given(objective, "target_source", f"loss {spec.name} does not use it ({', '.join(users)} would)")
    if not uses_reference(objective):
        why = f"{spec.name} without objective.kl_coef" if "kl_coef" in spec.options else f"loss {spec.name}"
        for name in ("reference", "reference_mode"):
            _refuse_given(objective, name, f"{why} reads no reference")
    if spec.unit is Unit.ALL_RESPONSES:
        for name in ("min_reward_gap", "max_reward_gap"):
            _refuse_given(objective, name, f"loss {spec.name} takes every response and makes no pairs")
    low, high = objective.min_reward_gap, objective.max_reward_gap
    if low is not None and high is not None and low > high:
        rule = f"no pair is above it and below max_reward_gap={high}"
        works = f"objective.min_reward_gap={high / 10} would work"
        raise UserError(f"objective.min_reward_gap={show(low)}: {rule}; {works}.")


def _refuse_given(objective: ObjectiveConfig, name: str, rule: str) -> None:
    if (value := getattr(objective, name)) is not None and value != {}:
        raise UserError(f"objective.{name}={show(value)}: {rule}; objective.{name}=null would work.")


def _refuse_missing(spec: LossSpec, name: str) -> None:
    key = f"objective.{name}" if name in OF_STAGE["fusepo"] else f"objective.loss_kwargs.{name}"
    raise UserError(f"{key}=null: objective.loss={spec.name} needs it; {key}={EXAMPLES.get(name, 0.1)} would work.")
