"""The rules between fields, checked before anything heavy starts: no process group, no model, no torch.

Every error is one line: field, value, rule, and a value that would work. What follows from the settings (`facts.py`)
comes back as plain lines, which `fuserl train` prints.
"""

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NoReturn, Protocol

from fuserl_megatron.config.facts import batch_fact, layout_fact, num_steps, num_warmup_steps, steps_fact
from fuserl_megatron.config.objective import check_objective
from fuserl_megatron.config.schema import BuildConfig, Config, UserError
from fuserl_megatron.config.words import show


class ModelShape(Protocol):
    """What the checks ask of a model (`convert.hf_config.read_config` gives it). Counts, not bytes."""

    num_layers: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    max_position_embeddings: int


class DataSet(Protocol):
    """What the checks ask of a fused data set (its manifest)."""

    num_prompts: int
    max_token_id: int
    tokens: dict[str, float]
    """Has total_max: tokens of the longest prompt + response."""


def validate(
    config: Config,
    world_size: int,
    model_shape: ModelShape | None = None,
    *,
    data_set: DataSet | None = None,
    device: str | None = None,
) -> list[str]:
    """Check a training run and say what follows from its settings.

    Args:
        config: the run.
        world_size: ranks over all nodes.
        model_shape: the target model, or None when only the settings can be checked.
        data_set: manifest of the fused data set, where known; gives the number of steps.
        device: "cpu" or "cuda" where known; trainer.accelerator decides otherwise.

    Returns:
        Lines to print: layout, batch, steps.

    Raises:
        UserError: the first rule that does not hold.
    """
    if device is None and config.trainer.accelerator != "auto":
        device = {"cpu": "cpu", "gpu": "cuda"}[config.trainer.accelerator]
    _check_numbers(config)
    _check_trainer(config, device)
    check_objective(config.objective)
    _check_validation(config)
    _check_optimizer(config)
    data_parallel_size = _check_layout(config, world_size)
    if model_shape is not None:
        _check_model(config, model_shape, data_set)
    facts = [layout_fact(config, world_size, data_parallel_size), batch_fact(config, data_parallel_size)]
    num_prompts = None if data_set is None else data_set.num_prompts
    steps = num_steps(config, num_prompts)
    if steps is not None:
        warmup = num_warmup_steps(config, steps)
        if config.optim.sched.warmup_steps is not None and warmup >= steps:
            _refuse(config, "optim.sched.warmup_steps", f"must be smaller than the run's {steps} steps", steps // 10)
        facts.append(steps_fact(config, steps, warmup, num_prompts))
    return facts


def validate_build(config: BuildConfig) -> None:
    """Check a data set's settings before its inputs are read.

    Raises:
        UserError: the first rule that does not hold.
    """
    if not config.inputs:
        raise UserError("inputs=[]: needs at least one file of scored responses; type inputs=[responses.jsonl].")
    if config.reward_temperature < 0:
        _refuse(config, "reward_temperature", "must be positive, 0 (best source alone) or inf (uniform)", 0.01)
    if config.max_length < 2:
        _refuse(config, "max_length", "must hold a prompt and a response", 2048)
    if len(set(config.sources)) != len(config.sources):
        raise UserError(f"sources={show(config.sources)}: a source is named twice; name each once.")


# --- the rules ---


def _refuse(config: Any, field: str, rule: str, works: Any) -> NoReturn:
    raise UserError(f"{field}={show(attrgetter(field)(config))}: {rule}; {field}={show(works)} would work.")


def _check_numbers(config: Config) -> None:
    def check(holds: Callable[[Any], bool], rule: str, examples: dict[str, Any]) -> None:
        for field, works in examples.items():
            value = attrgetter(field)(config)
            if value is not None and not holds(value):
                _refuse(config, field, rule, works)

    checkpoint = "exp_manager.checkpoint_callback_params"
    at_least_one = {
        "trainer.max_epochs": 1,
        "trainer.max_steps": 100,
        "trainer.log_every_n_steps": 1,
        "model.tensor_model_parallel_size": 1,
        "model.pipeline_model_parallel_size": 1,
        "model.context_parallel_size": 1,
        "model.make_vocab_size_divisible_by": 128,
        "model.recompute_num_layers": 1,
        "model.logprob_chunk_size": 1024,
        "data.micro_batch_size": 1,
        "data.global_batch_size": 128,
        "objective.top_m": 4,
        "trainer.val_check_interval": 100,
        "trainer.limit_val_prompts": 256,
        "exp_manager.early_stopping_callback_params.patience": 3,
    }
    positive = {
        "trainer.distributed_timeout_minutes": 30.0,
        "optim.lr": 5e-6,
        "optim.eps": 1e-8,
        "objective.beta": 0.1,
    }
    not_negative = {
        "run.seed": 1234,
        "trainer.gradient_clip_val": 1.0,
        "optim.weight_decay": 0.0,
        "optim.sched.min_lr": 0.0,
        "optim.sched.warmup_steps": 0,
        f"{checkpoint}.every_n_train_steps": 500,
        "exp_manager.early_stopping_callback_params.min_delta": 0.0,
        "objective.min_reward_gap": 0.01,
        "objective.max_reward_gap": 0.1,
    }
    check(lambda value: value >= 1, "must be at least 1", at_least_one)
    check(lambda value: value > 0 and math.isfinite(value), "must be a positive number", positive)
    check(lambda value: value >= 0 and math.isfinite(value), "must not be negative or infinite", not_negative)
    check(lambda value: value == -1 or value >= 1, "must be at least 1, or -1 for all", {f"{checkpoint}.save_top_k": 2})
    check(lambda value: value >= 0, "must be positive, 0 or inf", {"data.reward_temperature": 0.01})
    check(lambda value: value >= 2, "a row must hold a prompt and a response", {"data.seq_length": 2048})
    check(lambda value: 0 <= value < 1, "must lie in [0, 1)", {"optim.sched.warmup_ratio": 0.1})
    check(lambda value: all(0 <= beta < 1 for beta in value), "must lie in [0, 1)", {"optim.betas": (0.9, 0.95)})


def _check_trainer(config: Config, device: str | None) -> None:
    trainer, model, packing = config.trainer, config.model, config.data.packing
    if trainer.max_epochs is None and trainer.max_steps is None:
        _refuse(config, "trainer.max_epochs", "the run would not end, for trainer.max_steps is null as well", 1)
    if model.transformer_impl == "transformer_engine" and device == "cpu":
        _refuse(config, "model.transformer_impl", "Transformer Engine needs CUDA, and this run is on the CPU", "local")
    if model.recompute_num_layers != 1 and model.recompute_granularity != "full":
        _refuse(config, "model.recompute_num_layers", "is used with model.recompute_granularity=full only", 1)
    if packing.share_prefix == "on" and not packing.enabled:
        _refuse(config, "data.packing.share_prefix", "data.packing.enabled=false shares no row with anything", "auto")


def _check_validation(config: Config) -> None:
    """What validation and its metric are needed for."""
    manager, path = config.exp_manager, "exp_manager.checkpoint_callback_params"
    monitor, stopping = manager.checkpoint_callback_params.monitor, manager.early_stopping_callback_params
    if config.data.validation_path is None:
        needing = {"trainer.val_check_interval": None, "trainer.limit_val_prompts": None, f"{path}.monitor": None}
        for field, works in needing.items():
            if attrgetter(field)(config) is not None:
                _refuse(config, field, "needs data.validation_path, a data set of held-out prompts", works)
    if monitor is not None and not monitor.startswith("val_"):
        _refuse(config, f"{path}.monitor", "must be a validation metric", "val_loss")
    if monitor is not None and manager.checkpoint_callback_params.every_n_train_steps is None:
        _refuse(config, f"{path}.monitor", "needs checkpoints (every_n_train_steps is null)", None)
    if monitor is None and manager.checkpoint_callback_params.mode != "min":
        _refuse(config, f"{path}.mode", f"is used with {path}.monitor only", "min")
    if monitor is None and stopping.patience is not None:
        field = "exp_manager.early_stopping_callback_params.patience"
        _refuse(config, field, f"needs {path}.monitor, the metric to look at", None)
    if stopping.patience is None and stopping.min_delta:
        field = "exp_manager.early_stopping_callback_params.min_delta"
        _refuse(config, field, "is used with early_stopping_callback_params.patience only", 0.0)
    if config.objective.reference_mode == "swap" and config.optim.overlap_param_gather:
        rule = "optim.overlap_param_gather may still be writing weights while they are swapped"
        _refuse(config, "objective.reference_mode", rule, "cache")


def _check_optimizer(config: Config) -> None:
    optim, sched = config.optim, config.optim.sched
    if sched.min_lr > optim.lr:
        _refuse(config, "optim.sched.min_lr", f"must not be above optim.lr={optim.lr}", optim.lr / 10)
    if sched.name == "constant" and sched.min_lr:
        _refuse(config, "optim.sched.min_lr", "optim.sched.name=constant never falls to it", 0.0)
    if optim.overlap_param_gather and not optim.use_distributed_optimizer:
        _refuse(config, "optim.overlap_param_gather", "needs optim.use_distributed_optimizer=true", False)
    if optim.overlap_param_gather and not optim.overlap_grad_reduce:
        _refuse(config, "optim.overlap_param_gather", "needs optim.overlap_grad_reduce=true as well", False)


def _check_layout(config: Config, world_size: int) -> int:
    """Returns the data-parallel size."""
    model, length = config.model, config.data.seq_length
    tp, pp, cp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size
    if model.virtual_pipeline_model_parallel_size is not None:
        rule = (
            "refused, because core's interleaved schedule gives wrong gradients in silence in some layouts "
            "(2 pipeline ranks without overlapped communication; core 0.16 on gloo)"
        )
        _refuse(config, "model.virtual_pipeline_model_parallel_size", rule, None)
    if cp > 1:
        _refuse(config, "model.context_parallel_size", "context parallelism is not offered yet", 1)
    unit = tp * pp * cp
    if world_size % unit:
        below = world_size // unit * unit
        choice = f"{below} or {below + unit}" if below else str(unit)
        raise UserError(
            f"world size {world_size}: must be a multiple of TP {tp} x PP {pp} x CP {cp} = {unit}; "
            f"--nproc {choice} would work."
        )
    if model.sequence_parallel and tp == 1:
        _refuse(config, "model.sequence_parallel", "needs model.tensor_model_parallel_size > 1", False)
    if model.sequence_parallel and length % tp:
        rule = f"model.sequence_parallel splits a row over {tp} ranks, which does not divide it"
        _refuse(config, "data.seq_length", rule, length // tp * tp or tp)
    return world_size // unit


def _check_model(config: Config, shape: ModelShape, data_set: DataSet | None) -> None:
    tp, pp = config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size
    counts = {
        "attention heads": shape.num_attention_heads,
        "key/value heads": shape.num_query_groups,
        "MLP channels": shape.ffn_hidden_size,
    }
    for what, count in counts.items():
        if count % tp:
            works = _largest_divisor(math.gcd(*counts.values()), tp)
            _refuse(config, "model.tensor_model_parallel_size", f"does not divide the model's {count} {what}", works)
    if shape.num_layers % pp:
        rule = f"does not divide the model's {shape.num_layers} layers"
        _refuse(config, "model.pipeline_model_parallel_size", rule, _largest_divisor(shape.num_layers, pp))
    # a packed row may be longer than any position: what counts is the longest prompt + response
    longest = int(data_set.tokens["total_max"]) if data_set is not None else 0
    limit = shape.max_position_embeddings
    if longest > limit:
        raise UserError(
            f"data.path={config.data.path}: its longest prompt + response has {longest} tokens, and the model's "
            f"max_position_embeddings is {limit}; build it with max_length={limit}."
        )
    if data_set is not None and data_set.max_token_id >= shape.vocab_size:
        raise UserError(
            f"data.path={config.data.path}: holds token {data_set.max_token_id}, and the model's vocabulary has "
            f"{shape.vocab_size}; build the data set with the tokenizer of model.path."
        )


def _largest_divisor(number: int, at_most: int) -> int:
    return max(divisor for divisor in range(1, at_most + 1) if number % divisor == 0)
