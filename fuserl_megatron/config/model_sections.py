"""Settings of the model and its batches: sections model, data. See `schema.py`."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The target model and its layout over the ranks."""

    path: str = "???"
    """Hugging Face directory, or hub name (org/name), of the target's starting weights (safetensors)."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer that the exported model carries; null takes model.path."""
    tensor_model_parallel_size: int = 1
    """Ranks over which each layer's matrices are split."""
    pipeline_model_parallel_size: int = 1
    """Ranks over which the layers are split."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank (interleaved schedule); null for one."""
    context_parallel_size: int = 1
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
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times TP. Padded rows never leave the trainer."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, core attention only, or whole layers."""
    recompute_num_layers: int = 1
    """With full: layers per recomputed unit."""
    logprob_chunk_size: int = 1024
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
    seq_length: int = 2048
    """Tokens per row."""
    micro_batch_size: int = 1
    """Rows per micro-batch (per data-parallel rank)."""
    global_batch_size: int = 128
    """Prompts (groups) per optimizer step, over all ranks."""
    shuffle: bool = True
    """Permute the prompts anew each epoch, as a function of (seed, epoch) alone."""
    reward_temperature: float | None = None
    """Overrides the temperature the data set was built with; null keeps it."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    """Rows and prefix sharing."""
