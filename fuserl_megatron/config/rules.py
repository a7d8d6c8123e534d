"""Rules between a run's settings, each with a value that would work: trainer, validation, optimizer."""

import dataclasses
from operator import attrgetter
from typing import Any, NoReturn

from fuserl_megatron.config.schema import Config
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import show


def refuse(config: Any, field: str, rule: str, works: Any) -> NoReturn:
    """A `UserError` that names field, value, rule and a value that would work."""
    raise UserError(f"{field}={show(attrgetter(field)(config))}: {rule}; {field}={show(works)} would work.")


def check_trainer(config: Config) -> None:
    """Length, layer specification, recompute, packing."""
    trainer, model, packing = config.trainer, config.model, config.data.packing
    on_cpu = trainer.accelerator == "cpu"  # with auto it shows when the ranks start
    if trainer.max_epochs is None and trainer.max_steps is None:
        refuse(config, "trainer.max_epochs", "the run would not end, for trainer.max_steps is null as well", 1)
    if model.transformer_impl == "transformer_engine" and on_cpu:
        refuse(config, "model.transformer_impl", "Transformer Engine needs CUDA, and this run is on the CPU", "local")
    if model.attention_backend in ("flex", "te") and on_cpu:
        refuse(config, "model.attention_backend", "needs CUDA, and this run is on the CPU", "sdpa")
    if model.attention_backend == "te" and packing.share_prefix != "off":
        rule = "Transformer Engine's packed attention knows no shared prefix: it needs data.packing.share_prefix=off"
        refuse(config, "model.attention_backend", rule, "auto")
    if model.attention_backend == "te" and model.context_parallel_size > 1:
        refuse(config, "model.attention_backend", "is not offered with context parallelism", "auto")
    if trainer.precision.startswith("fp8"):
        if on_cpu:
            refuse(config, "trainer.precision", "FP8 needs Transformer Engine on CUDA; this run is on the CPU", "bf16")
        if model.transformer_impl == "local":
            refuse(config, "model.transformer_impl", f"trainer.precision={trainer.precision} needs TE's layers", "auto")
    elif model.fp8_params:
        refuse(config, "model.fp8_params", "is used with trainer.precision=fp8_* only", False)
    if model.fp8_params and not config.optim.use_distributed_optimizer:
        refuse(config, "model.fp8_params", "needs optim.use_distributed_optimizer=true", False)
    if model.fp8_params and config.objective.reference_mode == "swap":
        refuse(config, "objective.reference_mode", "model.fp8_params=true leaves no room to swap weights", "cache")
    if model.recompute_num_layers != 1 and model.recompute_granularity != "full":
        refuse(config, "model.recompute_num_layers", "is used with model.recompute_granularity=full only", 1)
    steps = config.exp_manager.profile_steps
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        refuse(config, "exp_manager.profile_steps", "must be a first and a last step, counted from 1", [10, 12])
    if not steps and config.exp_manager.profile_dir is not None:
        refuse(config, "exp_manager.profile_dir", "is used with exp_manager.profile_steps only", None)
    if packing.share_prefix == "on" and not packing.enabled:
        refuse(config, "data.packing.share_prefix", "data.packing.enabled=false shares no row with anything", "auto")


def check_adapter(config: Config) -> None:
    """What a LoRA adapter needs, and the reference that is the model without it."""
    adapter, objective = config.adapter, config.objective
    if adapter.kind == "none":
        for field in dataclasses.fields(adapter):
            if getattr(adapter, field.name) != field.default:
                refuse(config, f"adapter.{field.name}", "is used with adapter.kind=lora only", field.default)
    elif config.trainer.precision.startswith("fp8"):
        refuse(config, "trainer.precision", "LoRA in FP8 has never been run", "bf16")
    if objective.reference_mode == "adapter":
        if adapter.kind == "none":
            refuse(config, "objective.reference_mode", "there is no adapter to switch off (adapter.kind=none)", "cache")
        if objective.reference is not None:
            rule = "without its adapter the model is model.path, not objective.reference"
            refuse(config, "objective.reference_mode", rule, "cache")


def check_validation(config: Config) -> None:
    """What validation and its metric are needed for."""
    manager, path = config.exp_manager, "exp_manager.checkpoint_callback_params"
    saving, stopping = manager.checkpoint_callback_params, manager.early_stopping_callback_params
    monitor = saving.monitor
    if config.data.validation_path is None:
        needing = {"trainer.val_check_interval": None, "trainer.limit_val_prompts": None, f"{path}.monitor": None}
        for field, works in needing.items():
            if attrgetter(field)(config) is not None:
                refuse(config, field, "needs data.validation_path, a data set of held-out prompts", works)
    if monitor is not None and not monitor.startswith("val_"):
        refuse(config, f"{path}.monitor", "must be a validation metric", "val_loss")
    if monitor is not None and saving.every_n_train_steps is None and saving.train_time_interval is None:
        refuse(config, f"{path}.monitor", "needs checkpoints (every_n_train_steps is null)", None)
    if monitor is None and saving.mode != "min":
        refuse(config, f"{path}.mode", f"is used with {path}.monitor only", "min")
    if monitor is None and stopping.patience is not None:
        field = "exp_manager.early_stopping_callback_params.patience"
        refuse(config, field, f"needs {path}.monitor, the metric to look at", None)
    if stopping.patience is None and stopping.min_delta:
        field = "exp_manager.early_stopping_callback_params.min_delta"
        refuse(config, field, "is used with early_stopping_callback_params.patience only", 0.0)
    if config.objective.reference_mode == "swap" and config.optim.overlap_param_gather:
        rule = "optim.overlap_param_gather may still be writing weights while they are swapped"
        refuse(config, "objective.reference_mode", rule, "cache")


def check_manager(config: Config) -> None:
    """Resuming and loggers."""
    manager = config.exp_manager
    if not (manager.resume_if_exists or manager.resume_ignore_no_checkpoint):
        rule = "exp_manager.resume_if_exists=false never resumes"
        refuse(config, "exp_manager.resume_ignore_no_checkpoint", rule, True)
    for logger, required in (("wandb", "project"), ("mlflow", None)):
        section, created = f"exp_manager.{logger}_logger_kwargs", getattr(manager, f"create_{logger}_logger")
        for field in dataclasses.fields(given := getattr(manager, f"{logger}_logger_kwargs")):
            if not created and getattr(given, field.name) != field.default:
                rule = f"is used with exp_manager.create_{logger}_logger=true only"
                refuse(config, f"{section}.{field.name}", rule, field.default)
        if created and required and not getattr(given, required):
            refuse(config, f"{section}.{required}", f"exp_manager.create_{logger}_logger needs it", "fuserl")


def check_optimizer(config: Config) -> None:
    """Schedule, overlap, formats and place of the states."""
    optim, sched = config.optim, config.optim.sched
    if sched.min_lr > optim.lr:
        refuse(config, "optim.sched.min_lr", f"must not be above optim.lr={optim.lr}", optim.lr / 10)
    if sched.name == "constant" and sched.min_lr:
        refuse(config, "optim.sched.min_lr", "optim.sched.name=constant never falls to it", 0.0)
    if optim.overlap_param_gather and not optim.use_distributed_optimizer:
        refuse(config, "optim.overlap_param_gather", "needs optim.use_distributed_optimizer=true", False)
    if optim.overlap_param_gather and not optim.overlap_grad_reduce:
        refuse(config, "optim.overlap_param_gather", "needs optim.overlap_grad_reduce=true as well", False)
    aware, needed = "optim.use_precision_aware_optimizer", "is used with optim.use_precision_aware_optimizer=true only"
    if optim.use_precision_aware_optimizer:
        if config.trainer.accelerator == "cpu":
            refuse(config, aware, "Transformer Engine's Adam needs CUDA, and this run is on the CPU", False)
        if not optim.use_distributed_optimizer:
            refuse(config, aware, "needs optim.use_distributed_optimizer=true", False)
        if config.trainer.precision == "32":
            refuse(config, aware, "splits bf16 weights and what they lack of fp32; trainer.precision is 32", False)
    else:
        for field in ("optim.main_params_dtype", "optim.exp_avg_dtype", "optim.exp_avg_sq_dtype"):
            if attrgetter(field)(config) != "fp32":
                refuse(config, field, needed, "fp32")
        if optim.optimizer_cpu_offload:
            refuse(config, "optim.optimizer_cpu_offload", needed, False)
    if optim.optimizer_offload_fraction != 1.0 and not optim.optimizer_cpu_offload:
        rule = "is used with optim.optimizer_cpu_offload=true only"
        refuse(config, "optim.optimizer_offload_fraction", rule, 1.0)
