"""What other trainers call a setting (TRL, ms-swift, LLaMA-Factory, NeMo-RL, Megatron-LM), and what it is here.

A row: their names (the last part of a key, lower case, - and _ alike), our key or None, and what else is to be said.
Names that are spelt as ours, or nearly, need no row.
"""

from collections.abc import Collection
from typing import NamedTuple


class Peer(NamedTuple):
    """One setting."""

    theirs: str
    """Names with a space between."""
    ours: str | None
    note: str = ""


FULL = "an adapter is plain LoRA beside unquantized weights (adapter=lora)"
RANKS = "the number of ranks is --nproc N, torchrun's or srun's"
ACCUMULATION = "gradient accumulation follows from data.global_batch_size (prompts of a step over all ranks)"
TEMPLATED = "set when the data set is built: fuserl build"

# fmt: off
PEERS: tuple[Peer, ...] = (
    Peer("learning_rate lr_max max_lr", "optim.lr"),
    Peer("minimum_learning_rate min_learning_rate lr_min", "optim.sched.min_lr"),
    Peer("lr_scheduler_type lr_scheduler lr_decay_style scheduler", "optim.sched.name"),
    Peer("warmup warmup_iters lr_warmup_iters lr_warmup_steps num_warmup_steps", "optim.sched.warmup_steps"),
    Peer("lr_warmup_fraction warmup_fraction", "optim.sched.warmup_ratio"),
    Peer("adam_beta1 adam_beta2 beta1 beta2", "optim.betas", "both in one list, [0.9,0.95]"),
    Peer("adam_eps adam_epsilon epsilon", "optim.eps"),
    Peer("wd", "optim.weight_decay"),
    Peer("max_grad_norm clip_grad grad_clip gradient_clipping", "trainer.gradient_clip_val"),
    Peer("per_device_train_batch_size train_micro_batch_size per_device_batch_size micro_bs train_batch_size",
         "data.micro_batch_size", "rows of data.seq_length tokens; a step's prompts are data.global_batch_size"),
    Peer("per_device_eval_batch_size eval_batch_size", "data.micro_batch_size", "held-out prompts use it too"),
    Peer("gradient_accumulation_steps accumulate_grad_batches gradient_accumulation", None, ACCUMULATION),
    Peer("num_train_epochs epochs num_epochs max_num_epochs n_epochs", "trainer.max_epochs"),
    Peer("train_iters max_iters num_steps max_num_steps total_steps", "trainer.max_steps"),
    Peer("max_seq_length max_seq_len cutoff_len max_total_sequence_length sequence_length block_size model_max_length "
         "context_length", "data.seq_length", "a packed row; fuserl build cuts answers at max_length"),
    Peer("max_prompt_length max_completion_length max_new_tokens truncation_mode truncation_strategy overlong_filter",
         "data.on_too_long", "and max_length of fuserl build"),
    Peer("sample_packing sequence_packing padding_free", "data.packing.enabled"),
    Peer("bf16 fp16 fp32 torch_dtype dtype mixed_precision fp8 tf32", "trainer.precision", "bf16, 32, fp8_*"),
    Peer("output_dir save_dir save checkpoint_dir log_dir logging_dir ckpt_dir", "run.results_dir"),
    Peer("run_name exp_name job_name", "run.name"),
    Peer("save_steps save_interval save_period save_every save_strategy checkpointing_steps",
         "exp_manager.checkpoint_callback_params.every_n_train_steps"),
    Peer("save_total_limit keep_top_k", "exp_manager.checkpoint_callback_params.save_top_k"),
    Peer("metric_for_best_model metric_name", "exp_manager.checkpoint_callback_params.monitor"),
    Peer("early_stopping_patience", "exp_manager.early_stopping_callback_params.patience"),
    Peer("logging_steps log_interval log_every_n log_steps", "trainer.log_every_n_steps"),
    Peer("eval_steps eval_interval val_period eval_strategy evaluation_strategy", "trainer.val_check_interval"),
    Peer("eval_iters val_batches max_eval_samples", "trainer.limit_val_prompts"),
    Peer("report_to use_wandb", "exp_manager.create_wandb_logger", "or create_mlflow_logger, ..."),
    Peer("wandb_project", "exp_manager.wandb_logger_kwargs.project"),
    Peer("resume_from_checkpoint load_checkpoint resume", "exp_manager.resume_if_exists",
         "the same command on the same run.results_dir goes on"),
    Peer("model_name_or_path model_name pretrained_model_name_or_path model_id base_model", "model.path"),
    Peer("tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_model", "model.tokenizer"),
    Peer("ref_model reference_model ref_model_path ref_model_name_or_path", "objective.reference"),
    Peer("precompute_ref_log_probs sync_ref_model", "objective.reference_mode"),
    Peer("dataset dataset_name train_file train_data dataset_path data_path datasets train_dataset", "data.path",
         "a directory that fuserl build wrote"),
    Peer("eval_dataset val_dataset validation_file val_data eval_data", "data.validation_path"),
    Peer("loss_type pref_loss preference_loss rlhf_type rl_algorithm", "objective.loss"),
    Peer("simpo_gamma gamma", "objective.gamma_beta_ratio", "gamma divided by beta"),
    Peer("kl_beta pref_beta dpo_beta reference_policy_kl_penalty", "objective.beta"),
    Peer("rpo_lambda sft_loss_weight pref_ftx", "objective.rpo_alpha"),
    Peer("finetuning_stage", "objective.stage", "objective=fusesft, objective=fusepo_ln_dpo, ..."),
    Peer("tensor_parallel_size tp tp_size tensor_parallel tensor_model_parallel", "model.tensor_model_parallel_size"),
    Peer("pipeline_parallel_size pp pp_size pipeline_parallel", "model.pipeline_model_parallel_size"),
    Peer("context_parallel cp cp_size ulysses_degree", "model.context_parallel_size"),
    Peer("num_layers_per_virtual_pipeline_stage vpp virtual_pipeline_parallel_size",
         "model.virtual_pipeline_model_parallel_size"),
    Peer("data_parallel_size dp dp_size", None, f"data parallel is what the other sizes leave; {RANKS}"),
    Peer("expert_parallel_size expert_model_parallel_size ep", None, "models with experts (MoE) are not trained here"),
    Peer("nproc nproc_per_node num_gpus num_processes n_gpus world_size gpus", None, RANKS),
    Peer("num_nodes nnodes", None, f"{RANKS}; fuserl launch has cluster.nodes"),
    Peer("gradient_checkpointing activation_checkpointing recompute use_gradient_checkpointing",
         "model.recompute_granularity"),
    Peer("recompute_method", None, "whole layers are recomputed in units of model.recompute_num_layers"),
    Peer("attn_implementation flash_attn use_flash_attn attn_impl flash_attention", "model.attention_backend"),
    Peer("deepspeed fsdp zero_stage fsdp_config", "optim.use_distributed_optimizer", "optim=distributed sets it"),
    Peer("offload cpu_offload optimizer_offload offload_optimizer", "optim.optimizer_cpu_offload"),
    Peer("use_cpu no_cuda device", "trainer.accelerator"),
    Peer("lora peft peft_scheme use_peft use_lora finetuning_type tuner_type train_type", "adapter.kind",
         "adapter=lora sets it"),
    Peer("lora_r lora_rank adapter_dim", "adapter.rank"),
    Peer("lora_alpha", "adapter.alpha"),
    Peer("lora_dropout adapter_dropout", "adapter.dropout", "which must be 0"),
    Peer("lora_target lora_target_modules target_modules", "adapter.targets"),
    Peer("adapter_name_or_path peft_model_id restore_from_path", "adapter.path"),
    Peer("qlora load_in_4bit load_in_8bit quantization_bit use_dora", None, FULL),
    Peer("optimizer optim_type", "optim.name"),
    Peer("data_seed random_seed", "run.seed"),
    Peer("shuffle_dataset", "data.shuffle"),
    Peer("template chat_template_path chat_template enable_thinking system system_prompt", None, TEMPLATED),
    Peer("temperature tau", "data.reward_temperature", "of the source weights"),
    Peer("streaming preprocessing_num_workers dataloader_num_workers num_workers", None,
         "the data set is memory-mapped, nothing is to be set"),
    Peer("push_to_hub hub_model_id", None, "the export is a directory: hf upload NAME RESULTS/hf"),
    Peer("use_liger_kernel use_unsloth", None, "log-probabilities are computed in chunks anyway"),
    Peer("timeout ddp_timeout distributed_timeout", "trainer.distributed_timeout_minutes"),
)
# fmt: on
BY_NAME = {name: peer for peer in PEERS for name in peer.theirs.split()}
OF_BUILD = {
    "model.path": "tokenizer",
    "model.tokenizer": "tokenizer",
    "data.path": "inputs",
    "data.seq_length": "max_length",
}
"""Our key, for what `fuserl train` calls it, in the settings of `fuserl build`."""


def peer_advice(key: str, known: Collection[str]) -> str | None:
    """The question " Did you mean optim.lr?", or why there is no such setting; None where no peer has it, either.

    `known` are the keys of the settings asked for: of `fuserl build` and `launch` they are not those of `train`.
    """
    peer = BY_NAME.get(key.rpartition(".")[2].lower().replace("-", "_"))
    if peer is None:
        return None
    if peer.ours is None:
        return f" There is none: {peer.note}."
    if peer.ours in known:
        return f" Did you mean {peer.ours}?" + (f" ({peer.note})" if peer.note else "")
    if OF_BUILD.get(peer.ours) in known:
        return f" Did you mean {OF_BUILD[peer.ours]}?"
    return f" It is {peer.ours} of fuserl train (in fuserl launch train.{peer.ours} or STAGE.{peer.ours})."
