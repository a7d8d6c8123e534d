"""Settings of a run around its model: sections run, trainer, exp_manager. See `schema.py`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fuserl_megatron.config.ranges import DURATION, Range, at_least, not_negative, positive

# fmt: off
Check = Literal["first_step_loss", "prompt_weights", "mask_coverage", "group_integrity", "reference_hash",
                "tokenizer_match", "template_match"]
# fmt: on


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What this run is called and where it writes."""

    name: str = "fuserl"
    """Shown in logs and written into the model card."""
    results_dir: str = "runs/fuserl"
    """Everything the run writes: resolved config, logs, metrics, checkpoints, the exported model under hf/."""
    seed: Annotated[int, not_negative()] = 1234
    """Seeds the data order. Nothing else in training is random (dropout is 0)."""
    export: bool = True
    """Write a Hugging Face directory to results_dir/hf at the end: the best checkpoint's where one is monitored."""
    disable_checks: tuple[Check, ...] = ()
    """What is not to be checked before or during the run (train/checks.py says what each is); all are by default."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, on what, in which number format."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes CUDA with NCCL when torch sees a GPU, otherwise the CPU with gloo."""
    precision: Literal["32", "bf16", "fp8_delayed", "fp8_current", "fp8_blockwise", "fp8_mxfp8"] = "bf16"
    """Number format of the weights and activations. With bf16 the optimizer keeps fp32 master weights. fp8_*: bf16 with
    the layers' matrix products in FP8, by Transformer Engine's recipe of that name (CUDA; mxfp8: Blackwell)."""
    max_epochs: Annotated[int | None, at_least(1)] = 1
    """Passes over the prompts; null leaves max_steps alone to decide."""
    max_steps: Annotated[int | None, at_least(1, 100)] = None
    """Optimizer steps; the smaller of both limits ends the run."""
    gradient_clip_val: Annotated[float, not_negative()] = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    log_every_n_steps: Annotated[int, at_least(1)] = 1
    """Steps between lines of the step log. metrics.jsonl always has every step."""
    val_check_interval: Annotated[int | None, at_least(1, 100)] = None
    """Steps between validations on data.validation_path; null validates at step 0 and at the end only."""
    limit_val_prompts: Annotated[int | None, at_least(1, 256)] = None
    """Validate on the first so many prompts; null takes all."""
    distributed_timeout_minutes: Annotated[float, positive()] = 30.0
    """How long a collective may wait for a rank before the run is given up."""
    hang_timeout_minutes: Annotated[float, not_negative()] = 20.0
    """Minutes without a step, a batch of validation or a save, once the model is ready, until every rank writes its
    stacks to results_dir/logs and ends; 0: never. Keep it below distributed_timeout_minutes, which ends a run without
    stacks, and above the time that the first step or one save takes."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """NeMo's exp_manager.checkpoint_callback_params."""

    every_n_train_steps: Annotated[int | None, not_negative()] = 500
    """Steps between checkpoints, and one at the end. 0: only at the end; null, with train_time_interval null as well:
    none at all (the export is then all there is)."""
    train_time_interval: Annotated[float | None, positive(60.0)] = None
    """Minutes between checkpoints, taken at the first step boundary after them, and one at the end; may stand beside
    every_n_train_steps."""
    async_save: bool = False
    """Copy the state into the host's memory and write it while training goes on; it gets its name at a later step."""
    save_retries: Annotated[int, not_negative()] = 2
    """How often a checkpoint that could not be written is tried again before the run goes on without it."""
    save_top_k: Annotated[int, Range(lambda value: value == -1 or value >= 1, "must be at least 1, or -1 for all")] = 2
    """How many checkpoints are kept, the newest, or with monitor the best (and the newest besides); -1 keeps all."""
    monitor: str | None = None
    """Validation metric that says which checkpoint is best (val_loss, val_accuracy, ...); null: no best one."""
    mode: Literal["min", "max"] = "min"
    """Whether the monitored metric is better when it is smaller or larger."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """NeMo's early_stopping_callback_params; the metric is checkpoint_callback_params.monitor."""

    patience: Annotated[int | None, at_least(1, 3)] = None
    """Validations in a row without a new best value after which the run ends; null never ends it."""
    min_delta: Annotated[float, not_negative()] = 0.0
    """How much better a value must be to count as a new best one."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """NeMo's exp_manager.wandb_logger_kwargs. The key to the service is $WANDB_API_KEY alone."""

    project: str | None = None
    """Required with create_wandb_logger."""
    name: str | None = None
    """The run's name there; null takes run.name."""
    entity: str | None = None
    """User or team; null takes the account's default."""
    group: str | None = None
    """Runs that belong together."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""
    offline: bool = False
    """Write to results_dir/wandb only; `wandb sync` uploads later. $WANDB_MODE=offline does the same."""


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """NeMo's exp_manager.mlflow_logger_kwargs. User and password are $MLFLOW_TRACKING_USERNAME and _PASSWORD alone."""

    experiment_name: str | None = None
    """The experiment that the run belongs to; null takes run.name."""
    tracking_uri: str | None = None
    """Server or database; null takes $MLFLOW_TRACKING_URI, and without it sqlite in results_dir/mlflow.db."""


@dataclass(frozen=True, kw_only=True)
class ExpManagerConfig:
    """NeMo's exp_manager section, as far as this trainer honours it; docs/nemo.md says where it differs."""

    explicit_log_dir: str | None = None
    """The run's directory: replaces run.results_dir. It is folded into it when the configuration is read."""
    name: str | None = None
    """The run's name: replaces run.name, and without explicit_log_dir adds a folder to run.results_dir."""
    version: str | None = None
    """One more folder below that. Not with explicit_log_dir."""
    resume_if_exists: bool = True
    """Continue from the newest checkpoint of results_dir. false refuses to start over existing checkpoints."""
    resume_ignore_no_checkpoint: bool = True
    """Start from model.path where results_dir has no checkpoint. false refuses that: the run must be a continuation."""
    create_preemption_callback: bool = True
    """On SIGUSR1 or SIGTERM save, write the file REQUEUE, and end with exit code 0 (docs/durability.md). false: the
    signals kill the run."""
    max_time_per_run: Annotated[str | None, DURATION] = None
    """DD:HH:MM:SS after which a start of the run stops as on a signal: early enough for one more step and a save, by
    what they took so far. A SLURM job stops before its end in the same way, without this setting."""
    create_tensorboard_logger: bool = True
    """Write TensorBoard events to results_dir/tensorboard."""
    create_wandb_logger: bool = False
    """Log to Weights & Biases (`pip install 'fuserl-megatron[track]'`)."""
    wandb_logger_kwargs: WandbConfig = field(default_factory=WandbConfig)
    """Where to, and under which name."""
    create_mlflow_logger: bool = False
    """Log to MLflow (`pip install 'fuserl-megatron[track]'`)."""
    mlflow_logger_kwargs: MlflowConfig = field(default_factory=MlflowConfig)
    """Where to, and under which name."""
    metrics: tuple[str, ...] = ()
    """Metrics of your own, package.module:function each, in training and validation (docs/extending.md)."""
    profile_steps: tuple[int, ...] = ()
    """First and last optimizer step (from 1) that torch's profiler traces on every rank, such as [10,12]; [] for none.
    A traced step is slower than others."""
    profile_dir: str | None = None
    """Where the traces go, a rankR.json each (chrome://tracing, Perfetto); null takes results_dir/profile."""
    checkpoint_callback_params: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written and which are kept."""
    early_stopping_callback_params: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    """When to end early."""
