"""Which settings of `objective` belong together: options per stage and loss, and the defaults of those left null.

What each loss reads stands in objectives/loss_table.py, which is plain data (no torch); nothing is repeated here.
"""

import dataclasses

from fuserl_megatron.config.schema import Config, ObjectiveConfig
from fuserl_megatron.objectives.loss_table import LOSSES, PreferenceLoss, Unit, checked_options, needs_reference
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import show

OF_STAGE = {
    "fusesft": ("selection", "top_m", "nll_reduction"),
    "fusepo": (
        "loss",
        *dict.fromkeys(option for spec in LOSSES.values() for option in spec.options),
        "target_source",
        "reference",
        "reference_mode",
        "min_reward_gap",
        "max_reward_gap",
    ),
}
DEFAULT_TOP_M = 4
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


def loss_options(objective: ObjectiveConfig) -> dict[str, object]:
    """The options of the loss that are set, by name."""
    names = LOSSES[PreferenceLoss(objective.loss)].options
    return {name: getattr(objective, name) for name in names if getattr(objective, name) is not None}


def with_defaults(objective: ObjectiveConfig) -> ObjectiveConfig:
    """The objective with every null field that its stage and loss read filled from their defaults.

    Raises:
        UserError: a required option is missing, or one is set that the loss does not read.
    """
    if objective.stage == "fusesft":
        selection = objective.selection or "per_source"
        chosen = dict(selection=selection, nll_reduction=objective.nll_reduction or "token_mean")
        if selection == "top_m":
            chosen["top_m"] = objective.top_m or DEFAULT_TOP_M
        return dataclasses.replace(objective, **chosen)
    check_objective(objective)
    options = checked_options(objective.loss, loss_options(objective))
    if uses_reference(objective):
        options["reference_mode"] = objective.reference_mode or "cache"
    return dataclasses.replace(objective, **options)


def with_loss_defaults(config: Config) -> Config:
    """The run with its objective's null fields filled; see `with_defaults`."""
    return dataclasses.replace(config, objective=with_defaults(config.objective))


def uses_reference(objective: ObjectiveConfig) -> bool:
    """Whether reference log-probabilities are read at all."""
    if objective.stage == "fusesft":
        return False
    loss = PreferenceLoss(objective.loss)
    return needs_reference(loss, {**LOSSES[loss].options, **loss_options(objective)})


def _check_loss(objective: ObjectiveConfig) -> None:
    if objective.loss is None:
        raise UserError("objective.loss=null: objective.stage=fusepo needs a loss; objective.loss=ln_dpo would work.")
    loss = PreferenceLoss(objective.loss)
    for name in OF_STAGE["fusepo"]:
        users = [other.value for other, spec in LOSSES.items() if name in spec.options]
        if users and loss.value not in users:
            _refuse_given(objective, name, f"loss {loss.value} does not use it ({', '.join(users)} would)")
    for name, default in LOSSES[loss].options.items():
        if default is None and getattr(objective, name) is None:
            _refuse_missing(loss, name)
    try:
        checked_options(loss, loss_options(objective))
    except ValueError as error:
        raise UserError(f"objective: {error}") from None
    if loss is PreferenceLoss.WRPO and objective.target_source is None:
        _refuse_missing(loss, "target_source")
    if loss is not PreferenceLoss.WRPO:
        _refuse_given(objective, "target_source", f"loss {loss.value} does not use it (wrpo would)")
    if not uses_reference(objective):
        why = "rloo without objective.kl_coef" if loss is PreferenceLoss.RLOO else f"loss {loss.value}"
        for name in ("reference", "reference_mode"):
            _refuse_given(objective, name, f"{why} reads no reference")
    if LOSSES[loss].unit is Unit.ALL_RESPONSES:
        for name in ("min_reward_gap", "max_reward_gap"):
            _refuse_given(objective, name, f"loss {loss.value} takes every response and makes no pairs")
    low, high = objective.min_reward_gap, objective.max_reward_gap
    if low is not None and high is not None and low > high:
        rule = f"no pair is above it and below max_reward_gap={high}"
        works = f"objective.min_reward_gap={high / 10} would work"
        raise UserError(f"objective.min_reward_gap={show(low)}: {rule}; {works}.")


def _refuse_given(objective: ObjectiveConfig, name: str, rule: str) -> None:
    if (value := getattr(objective, name)) is not None:
        raise UserError(f"objective.{name}={show(value)}: {rule}; objective.{name}=null would work.")


def _refuse_missing(loss: PreferenceLoss, name: str) -> None:
    raise UserError(
        f"objective.{name}=null: objective.loss={loss.value} needs it; objective.{name}={EXAMPLES[name]} would work."
    )
