"""Every setting of the product, once: name, type, default, unit.

Frozen keyword-only dataclasses; the string under a field is its documentation. The sections run, trainer and
exp_manager lie in `run_sections.py`. `load.py` maps the hydra tree in conf/ onto them, `validate.py` holds the rules.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fuserl_megatron.config.adapter_section import AdapterConfig as AdapterConfig
from fuserl_megatron.config.ranges import SHARES, Range, at_least, not_negative, positive, share
from fuserl_megatron.config.run_sections import CheckpointConfig as CheckpointConfig
from fuserl_megatron.config.run_sections import EarlyStoppingConfig as EarlyStoppingConfig
from fuserl_megatron.config.run_sections import ExpManagerConfig as ExpManagerConfig
from fuserl_megatron.config.run_sections import RunConfig as RunConfig
from fuserl_megatron.config.run_sections import TrainerConfig as TrainerConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The target model and its layout over the ranks."""

    path: str = "???"
    """Hugging Face directory, or hub name (org/name), of the target's starting weights (safetensors)."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer that the exported model carries; null takes model.path."""
    tensor_model_parallel_size: Annotated[int, at_least(1)] = 1
    """Ranks over which each layer's matrices are split."""
    pipeline_model_parallel_size: Annotated[int, at_least(1)] = 1
    """Ranks over which the layers are split."""
    virtual_pipeline_model_parallel_size: Annotated[int | None, at_least(2, rule="must be at least 2, or null")] = None
    """Model chunks per pipeline rank (interleaved schedule); null for one."""
    context_parallel_size: Annotated[int, at_least(1)] = 1
    """Ranks over which one row's tokens are split."""
    sequence_parallel: bool = False
    """Split norms and dropouts of tensor-parallel ranks along the tokens (saves activation memory; needs TP > 1)."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer specification: Transformer Engine's on CUDA where it is installed, otherwise core's local one."""
    attention_backend: Literal["auto", "sdpa", "flex", "te"] = "auto"
    """Core attention: torch's SDPA, FlexAttention (CUDA), Transformer Engine's packed attention (CUDA, no shared
    prefixes). auto: flex on CUDA, sdpa on the CPU."""
    fp8_params: bool = False
    """With trainer.precision=fp8_*: keep the layers' weights themselves in FP8 (master weights stay fp32). Needs the
    distributed optimizer."""
    make_vocab_size_divisible_by: Annotated[int, at_least(1)] = 128
    """The vocabulary is padded to a multiple of this times TP. Padded rows never leave the trainer."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, core attention only, or whole layers."""
    recompute_num_layers: Annotated[int, at_least(1)] = 1
    """With full: layers per recomputed unit."""
    logprob_chunk_size: Annotated[int, at_least(1)] = 1024
    """Scored tokens whose logits exist at one time (fp32, vocabulary / TP wide)."""


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How groups are laid into rows."""

    enabled: bool = True
    """false gives every sequence a row of its own."""
    share_prefix: Literal["auto", "on", "off"] = "auto"
    """Compute a prompt once for all its responses. auto decides from the data set's measured token counts."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The fused data set and its way into batches."""

    path: str = "???"
    """Directory written by `fuserl build`."""
    validation_path: str | None = None
    """Another such directory, of held-out prompts; null trains without validation."""
    seq_length: Annotated[int, at_least(2, rule="a row must hold a prompt and a response")] = 2048
    """Tokens per row."""
    micro_batch_size: Annotated[int, at_least(1)] = 1
    """Rows per micro-batch (per data-parallel rank)."""
    global_batch_size: Annotated[int, at_least(1)] = 128
    """Prompts (groups) per optimizer step, over all ranks."""
    shuffle: bool = True
    """Permute the prompts anew each epoch, as a function of (seed, epoch) alone."""
    reward_temperature: Annotated[float | None, at_least(0, 0.01, rule="must be positive, 0 or inf")] = None
    """Overrides the temperature the data set was built with; null keeps it."""
    on_too_long: Literal["stop", "skip", "truncate"] = "stop"
    """Prompts that do not fit a row or micro-batch with what must lie together: stop with file and line, leave them
    out, or cut their responses on the right (which then have no end of turn). Both are counted."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    """Rows and prefix sharing."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    stage: Literal["fusesft", "fusepo"] = "fusesft"
    """The two stages of FuseRL."""
    selection: Literal["per_source", "top_m"] | None = None
    """FuseSFT: each source's best response with the source's weight (default), or the pool's top_m by reward."""
    top_m: Annotated[int | None, at_least(1, 4)] = None
    """FuseSFT with selection=top_m: responses per prompt (4 when null)."""
    nll_reduction: Literal["token_mean", "token_sum", "weighted_token_mean"] | None = None
    """FuseSFT: mean over a response's tokens (default), their sum, or one weighted mean over the batch's tokens."""
    loss: str | None = None
    """FusePO: the loss, by its name in docs/math.md, or package.module:object for one of your own. Of the options
    below each takes some (null: its default), and the others are refused."""
    beta: Annotated[float | None, positive(0.1)] = None
    """All but rloo: scale of the log-ratio; defaults differ by orders of magnitude (0.01 for dpo, 10 for ln_dpo)."""
    label_smoothing: float | None = None
    """cdpo, robust (required), exo (0.001): the share of pairs that are the wrong way round, in [0, 0.5)."""
    gamma_beta_ratio: float | None = None
    """simpo: the margin gamma divided by beta."""
    length_normalized: bool | None = None
    """ipo: log-ratios per token (default) or summed."""
    discopop_tau: float | None = None
    """discopop: how sharply its two parts change over around a margin of 0, in (0, 1]."""
    delta: float | None = None
    """bco, mpo: the implicit reward between good and bad, a constant (0 by default)."""
    preference_weight: float | None = None
    """mpo: weight of its DPO term."""
    bco_weight: float | None = None
    """mpo: weight of its BCO term."""
    cpo_alpha: float | None = None
    """cpo: weight of its NLL term."""
    rpo_alpha: float | None = None
    """All but cpo and orpo: weight of an SFT term (mean NLL of the chosen response) beside the loss (mpo: 1)."""
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
    loss_kwargs: dict[str, Any] = field(default_factory=dict)
    """Options of a loss of your own that are none of the above (docs/extending.md)."""
    reference: str | None = None
    """FusePO: Hugging Face directory or hub name of the reference model; null takes model.path (the FuseSFT result)."""
    reference_mode: Literal["cache", "resident", "swap", "adapter"] | None = None
    """FusePO: score the reference once onto disk (cache, the default), hold it as a second model and score every step
    (resident), hold one model whose weights are swapped with the CPU's for that (swap), or switch the LoRA adapter off
    for that (adapter, the default with one)."""
    min_reward_gap: Annotated[float | None, not_negative(0.01)] = None
    """FusePO: pairs whose reward gap is smaller are dropped and counted."""
    max_reward_gap: Annotated[float | None, not_negative(0.1)] = None
    """FusePO: pairs whose reward gap is larger are dropped and counted."""


@dataclass(frozen=True, kw_only=True)
class SchedConfig:
    """The learning rate over the steps (NeMo's optim.sched)."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: Annotated[int | None, not_negative(0)] = None
    """Steps of linear warm-up; null uses warmup_ratio."""
    warmup_ratio: Annotated[float, share()] = 0.1
    """Share of all steps spent warming up when warmup_steps is null."""
    min_lr: Annotated[float, not_negative()] = 0.0
    """Learning rate that cosine and linear reach just after the last step."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW through core's optimizer."""

    name: Literal["adamw"] = "adamw"
    """Decoupled weight decay; norms and biases are not decayed."""
    lr: Annotated[float, positive()] = 5e-6
    """Peak learning rate."""
    weight_decay: Annotated[float, not_negative()] = 0.0
    """Decoupled weight decay."""
    betas: Annotated[tuple[float, float], SHARES] = (0.9, 0.95)
    """Adam's moment decays."""
    eps: Annotated[float, positive()] = 1e-8
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
    optimizer_offload_fraction: Annotated[float, Range(lambda value: 0 < value <= 1, "must lie in (0, 1]")] = 1.0
    """With it: share of the states that is moved."""
    sched: SchedConfig = field(default_factory=SchedConfig)
    """Warm-up and decay."""


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
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA instead of all weights."""
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
    """Files of scored responses (JSONL, JSON, parquet, Arrow, CSV), folders or globs of them, directories that
    `fuserl score` wrote, or hub data set names."""
    format: str = "auto"
    """How a row is read: records, messages, sharegpt, alpaca, prompt_completion, preference, nemo_rl, ultrafeedback,
    responses, or auto: recognised by each file's first row."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Where a row has what a format calls by another name: a path (fields.reward=scores.overall), or =text for the same
    in all (fields.source="=llama")."""
    on_repeated: Literal["stop", "first", "max", "mean"] = "stop"
    """The reward of a response that comes again from one source with another reward; stop refuses it."""
    reader: str | None = None
    """package.module:function that reads the inputs' records, for files of another form (docs/extending.md)."""
    output: str = "???"
    """Directory to write."""
    tokenizer: str = "???"
    """Directory (the model directory) or hub name of the target's tokenizer."""
    chat_template: str | None = None
    """Jinja file that replaces the tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the template, such as {enable_thinking: false}; give the same ones at inference."""
    reward_temperature: float | Literal["auto"] = float("nan")
    """tau of the source weights w = softmax(score / tau), or auto: by a rule from these data and the reward's accuracy,
    which one of the next three gives. Required, no default is safe (docs/data_format.md)."""
    reward_accuracy: float | None = None
    """With auto: how often the scores rank responses of two sources to one prompt rightly, above 0.5 and at most 1."""
    calibration: str | None = None
    """With auto: JSONL file of labelled pairs (chosen_reward, rejected_reward) on which that accuracy is measured."""
    second_reward: str | None = None
    """With auto: field of the records with another reward model's score; the accuracy follows from their agreement."""
    score_aggregation: Literal["max", "mean"] = "max"
    """A source's score from the rewards of its responses."""
    reward_standardization: Literal["none", "prompt", "dataset"] = "none"
    """Rewards to zero mean and unit deviation before the softmax."""
    max_length: Annotated[int, at_least(2, rule="must hold a prompt and a response")] = 2048
    """Longest prompt + response in tokens. Responses are cut on the right; a prompt without room is a bad record."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """stop at the first bad record with file and line, or skip: write it with the reason to rejected.jsonl."""
    sources: tuple[str, ...] = ()
    """Keep only these sources; empty keeps all."""
    force: bool = False
    """Replace an existing output directory."""
