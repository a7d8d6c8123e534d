"""Core's GPTModel for one ModelShape: its configuration, the layer spec with our parts in its slots, the DDP wrapper.

What is ours is in layer.py, attention.py and rope.py. The output layer hands its hidden states through, so that
log-probabilities are taken chunk by chunk from the scored positions only (logprob.py); its weight stays where core, DDP
and checkpoints expect it.
"""

import logging
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from fuserl_megatron.config.layout_rules import check_tensor_parallel
from fuserl_megatron.config.schema import ModelConfig, OptimConfig
from fuserl_megatron.convert.hf_config import ModelShape
from fuserl_megatron.convert.layout import padded_vocab_size
from fuserl_megatron.convert.names import find_rule
from fuserl_megatron.mcore.attention import choose_backend
from fuserl_megatron.mcore.layer import ACTIVATIONS, apply_traits, layer_spec, norm_of, why_not_transformer_engine
from fuserl_megatron.mcore.logprob import LogitRule
from fuserl_megatron.mcore.parallel import Layout
from fuserl_megatron.mcore.precision import check_fp8, fp8_fields
from fuserl_megatron.util.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TargetModel:
    """This rank's part of a model: one chunk, or several with virtual pipeline stages."""

    shape: ModelShape
    chunks: list[GPTModel]
    config: TransformerConfig
    padded_vocab: int
    attention_backend: str

    @property
    def layers_alike(self) -> bool:
        """Whether one attention mask serves all layers."""
        return self.shape.sliding_window is None and self.shape.traits.attention_cap is None

    @property
    def logit_rule(self) -> LogitRule:
        """What the model does to its logits."""
        return LogitRule(self.shape.traits.logit_scale, self.shape.traits.logit_cap)

    @property
    def last(self) -> GPTModel:
        """The chunk that holds the output layer on the last stage."""
        return self.chunks[-1]

    def output_weight(self) -> torch.Tensor:
        """This rank's rows [v, H] of the output matrix; the embedding's when both are tied."""
        if self.shape.tie_word_embeddings:
            return self.last.shared_embedding_or_output_weight()
        return self.last.output_layer.weight


def have_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported here."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception:  # an unusable build raises all sorts of errors
        return False
    return True


def transformer_config(
    shape: ModelShape, model: ModelConfig, layout: Layout, dtype: torch.dtype, use_te: bool, precision: str = "bf16"
) -> TransformerConfig:
    """Core's configuration for a model shape and a layout; precision is trainer.precision, read for FP8."""
    if shape.attention_out_bias != shape.mlp_bias:
        raise UserError(
            f"{model.path}: attention_bias={shape.attention_out_bias} with mlp_bias={shape.mlp_bias} is not possible: "
            "core has one switch for the biases of the output projection and the MLP. Use a model with both or neither."
        )
    full = model.recompute_granularity == "full"
    on_gpu = layout.device.type == "cuda"
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        qk_layernorm=shape.qk_norm,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[shape.traits.activation],
        add_bias_linear=shape.mlp_bias,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        **fp8_fields(precision, model.fp8_params),
        perform_initialization=False,  # every parameter is loaded; see _mark_tensor_parallel
        use_cpu_initialization=not on_gpu,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vpp_size,
        context_parallel_size=layout.cp_size,
        sequence_parallel=model.sequence_parallel and layout.tp_size > 1,
        # the 3-tuple loss closure of step.py then gets no scaling from core: gradients are plain sums
        calculate_per_token_loss=True,
        recompute_granularity=None if model.recompute_granularity == "none" else model.recompute_granularity,
        recompute_method="uniform" if full else None,
        recompute_num_layers=model.recompute_num_layers if full else None,
        # fusions compile on the CPU for a minute and give nothing there
        bias_activation_fusion=on_gpu and shape.traits.activation == "silu",
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=layout.vpp_size is None,
        batch_p2p_sync=False,
        # with PP 2 and virtual stages both neighbours are the same rank: only the overlapped schedule is right, and in
        # core 0.16 only while nothing is freed that is still being sent (docs/parallelism.md)
        overlap_p2p_comm=layout.vpp_size is not None,
        deallocate_pipeline_outputs=on_gpu and use_te and layout.vpp_size is None,
    )


def build_model(
    shape: ModelShape, model: ModelConfig, layout: Layout, dtype: torch.dtype, precision: str = "bf16"
) -> TargetModel:
    """This rank's chunks of GPTModel, on the layout's device, weights not yet loaded.

    Raises:
        UserError: the shape does not divide over the layout, or Transformer Engine was asked for and is not there.
    """
    check_tensor_parallel(shape, layout.tp_size)
    wanted = model.transformer_impl
    why_not = why_not_transformer_engine(shape)
    if wanted == "transformer_engine" and why_not:
        raise UserError(
            f"model.transformer_impl=transformer_engine: not with this {shape.family} model ({why_not}); "
            "use model.transformer_impl=local."
        )
    use_te = wanted == "transformer_engine" or (
        wanted == "auto" and layout.device.type == "cuda" and have_transformer_engine() and not why_not
    )
    if use_te and (layout.device.type != "cuda" or not have_transformer_engine()):
        raise UserError(
            "model.transformer_impl=transformer_engine needs a GPU and the transformer-engine package: "
            "use model.transformer_impl=local, or `pip install fuserl-megatron[gpu]` on a CUDA machine."
        )
    check_fp8(precision, layout.device, use_te)
    backend = choose_backend(model.attention_backend, layout.device, use_te or have_transformer_engine())
    if backend == "te" and shape.traits.attention_cap is not None:
        raise UserError(
            f"model.attention_backend=te has no soft cap on scores, which this {shape.family} model needs; use flex."
        )
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    config = transformer_config(shape, model, layout, dtype, use_te, precision)
    padded = padded_vocab_size(shape.vocab_size, layout.tp_size, model.make_vocab_size_divisible_by)
    chunks = []
    for stage in range(layout.vpp_size or 1):
        vp_stage = stage if layout.vpp_size else None
        spec = layer_spec(shape, config, use_te)
        count = get_num_layers_to_build(config, vp_stage=vp_stage)
        chunk = GPTModel(
            config=config,
            # the final norm is not part of the layer spec
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=norm_of(shape)),
            vocab_size=padded,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=layout.pp_rank == 0 and stage == 0,
            post_process=layout.is_last_stage and stage == (layout.vpp_size or 1) - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        apply_traits(chunk, shape, backend)
        _mark_tensor_parallel(chunk)
        if chunk.post_process:
            chunk.output_layer.forward = _hand_through
        chunks.append(chunk.to(layout.device))
    return TargetModel(shape=shape, chunks=chunks, config=config, padded_vocab=padded, attention_backend=backend)


def _mark_tensor_parallel(chunk: GPTModel) -> None:
    """Say which parameters are split over TP. Core does so while it initialises weights, which is skipped here; without
    the marks the gradient norm counts the split parameters of the first TP rank only."""
    for name, parameter in chunk.named_parameters():
        rule = find_rule(name)[0].rule
        if rule != "plain" and not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, True, 1 if rule == "row" else 0, 1)


def _hand_through(hidden: torch.Tensor, weight=None, runtime_gather_output=None):
    """The output layer's forward: hidden states as they are. DDP's hooks on the layer still run."""
    return hidden, None


def wrap_for_training(target: TargetModel, optim: OptimConfig) -> list[DistributedDataParallel]:
    """Core's DDP around each chunk: fp32 gradient buffers, plain sums over data-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=optim.overlap_grad_reduce,
        overlap_param_gather=optim.overlap_param_gather,
        use_distributed_optimizer=optim.use_distributed_optimizer,
        average_in_collective=False,
        fp8_param_gather=target.config.fp8_param,
    )
    wrapped = [DistributedDataParallel(target.config, ddp_config, chunk) for chunk in target.chunks]
    target.config.finalize_model_grads_func = finalize_model_grads
    if optim.overlap_grad_reduce:
        no_sync = [w.no_sync for w in wrapped]
        target.config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
        if len(wrapped) > 1:
            target.config.grad_sync_func = [w.start_grad_sync for w in wrapped]
    return wrapped


def gather_parameters(wrapped: list[DistributedDataParallel]) -> None:
    """Make every rank's weights current, as saving wants them: with overlap_param_gather core gathers the updated
    shards in the next forward pass only."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
