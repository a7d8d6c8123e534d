"""AdamW through core's optimizers, and the step around them: check, clip, update.

The learning rate is set from outside each step (train/schedule.py): core's own scheduler is not used, so what it
would otherwise do is done here, namely no weight decay for norms and biases (the `wd_mult` of core's parameter groups).
"""

import math

import torch
from megatron.core import optimizer as core_optimizer
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer

from fuserl_megatron.config.schema import OptimConfig, TrainerConfig
from fuserl_megatron.mcore.model import have_transformer_engine
from fuserl_megatron.util.errors import UserError

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
"""Core stands uint8 for fp8 states."""


def _have_te_adam() -> bool:
    """Whether core's Adam is Transformer Engine's: not on the CPU (cpu.py), nor where that is not installed."""
    return core_optimizer.Adam.__module__.startswith("transformer_engine")


def build_optimizer(
    wrapped: list[DistributedDataParallel], optim: OptimConfig, trainer: TrainerConfig, dtype: torch.dtype
) -> ChainedOptimizer:
    """Core's optimizer over this rank's parameters; fp32 master weights when the parameters are bf16."""
    aware = optim.use_precision_aware_optimizer
    if aware and not _have_te_adam():
        why = "this run is on the CPU" if have_transformer_engine() else "transformer-engine is not installed"
        raise UserError(
            f"optim.use_precision_aware_optimizer=true needs Transformer Engine's Adam, and {why}: "
            "optim.use_precision_aware_optimizer=false would work."
        )
    states = dict(
        use_precision_aware_optimizer=True,
        # Core would keep of each master weight the 16 bits that the bf16 weight lacks, and its checkpoints would carry
        # them as if they were weights: no run could be resumed, and no other optimizer could read them.
        store_param_remainders=False,
        main_params_dtype=STATE_DTYPES[optim.main_params_dtype],
        exp_avg_dtype=STATE_DTYPES[optim.exp_avg_dtype],
        exp_avg_sq_dtype=STATE_DTYPES[optim.exp_avg_sq_dtype],
        optimizer_cpu_offload=optim.optimizer_cpu_offload,
        optimizer_offload_fraction=optim.optimizer_offload_fraction if optim.optimizer_cpu_offload else 0.0,
    )
    core_config = wrapped[0].config
    config = OptimizerConfig(
        **(states if aware else {}),
        fp8_recipe=core_config.fp8_recipe if core_config.fp8 else None,
        optimizer="adam",  # decoupled weight decay is core's default for adam
        lr=optim.lr,
        min_lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        clip_grad=trainer.gradient_clip_val,
        use_distributed_optimizer=optim.use_distributed_optimizer,
        overlap_param_gather=optim.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, wrapped)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def set_learning_rate(optimizer: ChainedOptimizer, lr: float, weight_decay: float) -> None:
    """Set both for the coming step; norms and biases (wd_mult 0) stay without decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def gradient_norm(optimizer: ChainedOptimizer) -> float:
    """Bring gradients into the optimizer's place; their global 2-norm, equal on all ranks also when NaN or infinite:
    core reduces it over the model-parallel group, and other groups hold the same reduced gradients."""
    return math.nan if optimizer.prepare_grads() else float(optimizer.get_grad_norm())


def clip_and_update(optimizer: ChainedOptimizer, grad_norm: float, max_norm: float) -> None:
    """Scale gradients down to max_norm (0 leaves them) and update the weights. Call after `gradient_norm`."""
    for part in optimizer.chained_optimizers:
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and max_norm > 0:
            # precision-aware states read the gradients elsewhere
            elsewhere = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, max_norm, grad_norm, elsewhere)
    optimizer.step_with_ready_grads()
