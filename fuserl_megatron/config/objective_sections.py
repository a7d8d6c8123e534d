"""Settings of what is minimised and how: sections objective, optim. See `schema.py`."""

from dataclasses import dataclass, field
from typing import Literal

# fmt: off
Loss = Literal["dpo", "ln_dpo", "cdpo", "robust", "hinge", "ipo", "simpo", "cpo", "orpo", "kto", "rloo", "wrpo",
               "mappo", "infifpo"]
# fmt: on


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    stage: Literal["fusesft", "fusepo"] = "fusesft"
    """The two stages of FuseRL."""
    selection: Literal["per_source", "top_m"] | None = None
    """FuseSFT: each source's best response with the source's weight (default), or the pool's top_m by reward."""
    top_m: int | None = None
    """FuseSFT with selection=top_m: responses per prompt (4 when null)."""
    nll_reduction: Literal["token_mean", "token_sum", "weighted_token_mean"] | None = None
    """FuseSFT: mean over a response's tokens (default), their sum, or one weighted mean over the batch's tokens."""
    loss: Loss | None = None
    """FusePO: the loss. Of the options below each takes some (null: its default), and the others are refused."""
    beta: float | None = None
    """All but rloo: scale of the log-ratio; defaults differ by orders of magnitude (0.01 for dpo, 10 for ln_dpo)."""
    label_smoothing: float | None = None
    """cdpo, robust (required): the share of pairs that are the wrong way round, in [0, 0.5)."""
    gamma_beta_ratio: float | None = None
    """simpo: the margin gamma divided by beta."""
    length_normalized: bool | None = None
    """ipo: log-ratios per token (default) or summed."""
    cpo_alpha: float | None = None
    """cpo: weight of its NLL term."""
    rpo_alpha: float | None = None
    """All but cpo and orpo: weight of an SFT term (mean NLL of the chosen response) beside the loss."""
    desirable_weight: float | None = None
    """kto: weight of the desirable responses."""
    undesirable_weight: float | None = None
    """kto: weight of the undesirable responses."""
    kl_coef: float | None = None
    """rloo: weight of the KL term in reward units per nat; 0 (default) needs no reference."""
    alpha_end: float | None = None
    """wrpo: the weight that the source response reaches at the last step, from 0."""
    target_source: str | None = None
    """wrpo (required): the source that is the target itself; its own samples give the pair."""
    fusion: Literal["max_margin", "mean", "confidence"] | None = None
    """infifpo: how the sources' log-probabilities become one reference."""
    reference: str | None = None
    """FusePO: Hugging Face directory or hub name of the reference model; null takes model.path (the FuseSFT result)."""
    reference_mode: Literal["cache", "resident", "swap"] | None = None
    """FusePO: score the reference once onto disk (cache, the default), hold it as a second model and score every step
    (resident), or hold one model whose weights are swapped with the CPU's for that (swap)."""
    min_reward_gap: float | None = None
    """FusePO: pairs whose reward gap is smaller are dropped and counted."""
    max_reward_gap: float | None = None
    """FusePO: pairs whose reward gap is larger are dropped and counted."""


@dataclass(frozen=True, kw_only=True)
class SchedConfig:
    """The learning rate over the steps (NeMo's optim.sched)."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; null uses warmup_ratio."""
    warmup_ratio: float = 0.1
    """Share of all steps spent warming up when warmup_steps is null."""
    min_lr: float = 0.0
    """Learning rate that cosine and linear reach just after the last step."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW through core's optimizer."""

    name: Literal["adamw"] = "adamw"
    """Decoupled weight decay; norms and biases are not decayed."""
    lr: float = 5e-6
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's moment decays."""
    eps: float = 1e-8
    """Adam's epsilon."""
    use_distributed_optimizer: bool = False
    """Split the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass runs (needs the distributed optimizer)."""
    use_precision_aware_optimizer: bool = False
    """Let Transformer Engine's Adam keep its states in the formats below (CUDA; needs the distributed optimizer)."""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """With it: format of the master weights (with fp32, only what bf16 weights lack of it is stored)."""
    exp_avg_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """With it: format of Adam's first moment."""
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """With it: format of Adam's second moment."""
    optimizer_cpu_offload: bool = False
    """Keep optimizer states in the host's memory and step there (CUDA; needs use_precision_aware_optimizer)."""
    optimizer_offload_fraction: float = 1.0
    """With it: share of the states that is moved."""
    sched: SchedConfig = field(default_factory=SchedConfig)
    """Warm-up and decay."""
