"""The rules between fields, checked before anything heavy starts: no process group, no model, no torch.

Every error is one line: field, value, rule, and a value that would work. What follows from the settings (`derived.py`)
comes back as plain lines, which `fuserl train` prints.
"""

from fuserl_megatron.config.derived import (
    batch_fact,
    layout_fact,
    steps_fact,
    steps_per_epoch,
    total_steps,
    warmup_steps,
)
from fuserl_megatron.config.layout_rules import DataSet, ModelShape, check_data_set, check_layout, check_model
from fuserl_megatron.config.objective import check_objective, open_loss
from fuserl_megatron.config.ranges import check_ranges
from fuserl_megatron.config.rules import (
    check_adapter,
    check_manager,
    check_optimizer,
    check_trainer,
    check_validation,
    refuse,
)
from fuserl_megatron.config.schema import BuildConfig, Config
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import show

TEMPLATE_ARGUMENTS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}


def validate(
    config: Config,
    world_size: int,
    model_shape: ModelShape | None = None,
    data_set: DataSet | None = None,
    held_out: DataSet | None = None,
) -> list[str]:
    """Check a training run and say what follows from its settings.

    Without model_shape only the settings are checked; data_set, the manifest, gives the number of steps; held_out is
    the validation set's.

    Returns:
        Lines to print: layout, batch, steps.

    Raises:
        UserError: the first rule that does not hold.
    """
    check_ranges(config)
    check_trainer(config)
    check_adapter(config)
    check_objective(config.objective)
    if config.exp_manager.metrics:
        open_loss(config, ())
    check_validation(config)
    check_manager(config)
    check_optimizer(config)
    data_parallel_size = check_layout(config, world_size)
    if model_shape is not None:
        check_model(config, model_shape, data_set)
        if held_out is not None:
            check_data_set(f"data.validation_path={config.data.validation_path}", model_shape, held_out)
    facts = [layout_fact(config, world_size, data_parallel_size), batch_fact(config, data_parallel_size)]
    num_prompts = None if data_set is None else data_set.num_prompts
    if num_prompts is not None or config.trainer.max_epochs is None:
        steps = total_steps(config.trainer, 0 if num_prompts is None else steps_per_epoch(config, num_prompts))
        warmup = warmup_steps(config.optim, steps)
        if config.optim.sched.warmup_steps is not None and warmup >= steps:
            refuse(config, "optim.sched.warmup_steps", f"must be smaller than the run's {steps} steps", steps // 10)
        facts.append(steps_fact(config, steps, warmup, num_prompts))
    return facts


def validate_build(config: BuildConfig) -> None:
    """Check a data set's settings before its inputs are read.

    Raises:
        UserError: the first rule that does not hold.
    """
    if not config.inputs:
        raise UserError("inputs=[]: needs at least one file of scored responses; type inputs=[responses.jsonl].")
    _check_temperature(config)
    check_ranges(config)
    for name in TEMPLATE_ARGUMENTS.intersection(config.chat_template_kwargs):
        raise UserError(f"chat_template_kwargs.{name}: the data set gives the template this one; leave it out.")
    if len(set(config.sources)) != len(config.sources):
        raise UserError(f"sources={show(config.sources)}: a source is named twice; name each once.")


ACCURACIES = {
    "reward_accuracy": "reward_accuracy=0.75 (how often the reward ranks answers of two sources rightly)",
    "calibration": "calibration=pairs.jsonl (labelled pairs)",
    "second_reward": "second_reward=FIELD (another reward model's scores)",
}
"""What `reward_temperature=auto` reads, and how it is typed."""


def _check_temperature(config: BuildConfig) -> None:
    given = [name for name in ACCURACIES if getattr(config, name) is not None]
    if config.reward_temperature != "auto":
        if config.reward_temperature < 0:
            rule = "must be positive, 0 (best source alone), inf (uniform) or auto"
            refuse(config, "reward_temperature", rule, 0.01)
        if given:
            value = show(getattr(config, given[0]))
            raise UserError(f"{given[0]}={value}: only reward_temperature=auto reads it; set that, or leave it out.")
        return
    if not given:
        raise UserError(f"reward_temperature=auto: needs one of {', '.join(ACCURACIES.values())}.")
    if len(given) > 1:
        raise UserError(f"reward_temperature=auto: reads one of {' and '.join(given)}, not both; leave the others out.")
    accuracy = config.reward_accuracy
    if accuracy is not None and accuracy <= 0.5:
        rule = "such a reward ranks no better than a coin and tells nothing; reward_temperature=inf weighs all alike"
        raise UserError(f"reward_accuracy={show(accuracy)}: {rule} (auto needs an accuracy above 0.5).")
    if accuracy is not None and not accuracy <= 1:
        refuse(config, "reward_accuracy", "is a share, at most 1", 0.75)
