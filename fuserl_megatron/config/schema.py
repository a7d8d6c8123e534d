"""Every setting of the product, once: name, type, default, unit.

Frozen keyword-only dataclasses; the string under a field is its documentation. The sections of a run lie in
`run_sections.py`, `model_sections.py` and `objective_sections.py`. `load.py` maps the hydra tree in conf/ onto them,
`validate.py` holds the rules between fields.
"""

from dataclasses import dataclass, field
from typing import Literal

from fuserl_megatron.config.model_sections import DataConfig as DataConfig
from fuserl_megatron.config.model_sections import ModelConfig as ModelConfig
from fuserl_megatron.config.model_sections import PackingConfig as PackingConfig
from fuserl_megatron.config.objective_sections import Loss as Loss
from fuserl_megatron.config.objective_sections import ObjectiveConfig as ObjectiveConfig
from fuserl_megatron.config.objective_sections import OptimConfig as OptimConfig
from fuserl_megatron.config.objective_sections import SchedConfig as SchedConfig
from fuserl_megatron.config.run_sections import Check as Check
from fuserl_megatron.config.run_sections import CheckpointConfig as CheckpointConfig
from fuserl_megatron.config.run_sections import EarlyStoppingConfig as EarlyStoppingConfig
from fuserl_megatron.config.run_sections import ExpManagerConfig as ExpManagerConfig
from fuserl_megatron.config.run_sections import MlflowConfig as MlflowConfig
from fuserl_megatron.config.run_sections import RunConfig as RunConfig
from fuserl_megatron.config.run_sections import TrainerConfig as TrainerConfig
from fuserl_megatron.config.run_sections import WandbConfig as WandbConfig


class UserError(ValueError):
    """Something the user can put right, in one line: what, where, what to type instead. Ends a command with code 2."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run (`fuserl train`)."""

    run: RunConfig = field(default_factory=RunConfig)
    """Name and place."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Length, device, precision."""
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    """Logging and checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Target model and layout."""
    data: DataConfig = field(default_factory=DataConfig)
    """Fused data set and batches."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Stage and loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """One data set (`fuserl build`)."""

    inputs: tuple[str, ...] = ()
    """JSONL or parquet files of scored responses, globs, or hub data set names."""
    output: str = "???"
    """Directory to write."""
    tokenizer: str = "???"
    """Directory (the model directory) or hub name of the target's tokenizer."""
    chat_template: str | None = None
    """Jinja file that replaces the tokenizer's chat template."""
    reward_temperature: float = float("nan")
    """tau of the source weights w = softmax(score / tau). Required, no default is safe (docs/data_format.md)."""
    score_aggregation: Literal["max", "mean"] = "max"
    """A source's score from the rewards of its responses."""
    reward_standardization: Literal["none", "prompt", "dataset"] = "none"
    """Rewards to zero mean and unit deviation before the softmax."""
    max_length: int = 2048
    """Longest prompt + response in tokens. Responses are cut on the right; a prompt without room is a bad record."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """stop at the first bad record with file and line, or skip: write it with the reason to rejected.jsonl."""
    sources: tuple[str, ...] = ()
    """Keep only these sources; empty keeps all."""
    force: bool = False
    """Replace an existing output directory."""
