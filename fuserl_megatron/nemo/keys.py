"""NeMo-Aligner's keys (gpt_sft.yaml, gpt_dpo.yaml) and what becomes of each: data alone. `settings.py` applies it,
docs/nemo.md shows it.

A row: NeMo's key (a `*` stands for any rest), our key or None, the values that are translated, a remark.

    our key, no values      the value is taken as it is
    our key, values         the value is looked up; one that is not among them is unsupported
    None, ANY               ignored whatever it says, for the reason given
    None, values            ignored when it has one of these values, otherwise unsupported
    None, ()                unsupported

null is "not set" in NeMo, too, and never unsupported. A key that is in no row is unsupported.
"""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One NeMo key."""

    nemo: str
    ours: str | None
    values: Any = None
    note: str = ""


ANY = "ANY"
OFF = (False, 0, 0.0)
PRECISION = {"bf16": "bf16", "bf16-mixed": "bf16", "bf16-true": "bf16", "32": "32", "32-true": "32"}
SCHEDULES = {"CosineAnnealing": "cosine", "WarmupAnnealing": "linear"}
OPTIMIZERS = {"fused_adam": False, "adamw": False, "distributed_fused_adam": True, "mcore_distributed_optim": True}
LOSSES = {"dpo": "dpo", "ipo": "ipo"}
RANKS = "the launcher's: `--nproc`, or cluster.nodes and cluster.gpus_per_node of `fuserl launch`"
LIGHTNING = "no Lightning here"
BUILT = "the data set's: `fuserl build`"
TEMPLATE = f"{BUILT} renders the tokenizer's chat template"
FIXED = "fixed by the model's config.json"
HF = "a Hugging Face directory is written instead (run.export)"
FUSED = "build a fused data set, data.path"
STEPS = "steps; a share of an epoch (a float) is unsupported"
M, C, D = "exp_manager.", "exp_manager.checkpoint_callback_params.", "model.data."


def _both(nemo: str, *rest: Any) -> tuple[Row, Row]:
    """The same row for trainer.sft and trainer.dpo."""
    return Row(f"trainer.sft.{nemo}", *rest), Row(f"trainer.dpo.{nemo}", *rest)


def _same(prefix: str, names: str, note: str = "") -> tuple[Row, ...]:
    """Keys (names with a space between) that are called the same here."""
    return tuple(Row(prefix + name, prefix + name, None, note) for name in names.split())


def _ignored(prefix: str, names: str, note: str) -> tuple[Row, ...]:
    """Keys (names with a space between) that are ignored whatever they say, for the same reason."""
    return tuple(Row(prefix + name, None, ANY, note) for name in names.split())


# fmt: off
TABLE: tuple[Row, ...] = (
    Row("name", None, ANY, "only read by other keys"),
    Row("defaults", None, ANY, "hydra's list of further files, which are not read"),
    Row("hydra.*", None, ANY, "hydra's own"),
    Row("precision", None, ANY, "a copy of trainer.precision"),
    # trainer
    *_ignored("trainer.", "num_nodes devices", RANKS),
    Row("trainer.accelerator", "trainer.accelerator", {"gpu": "gpu", "cpu": "cpu", "auto": "auto"}),
    Row("trainer.precision", "trainer.precision", PRECISION, "fp16 and fp8 are unsupported"),
    *_same("trainer.", "max_epochs max_steps", "-1 becomes null"),
    *_both("max_epochs", "trainer.max_epochs", None, "-1 becomes null"),
    *_both("max_steps", "trainer.max_steps", None, "-1 becomes null"),
    *_both("val_check_interval", "trainer.val_check_interval", None, STEPS),
    *_both("save_interval", C + "every_n_train_steps", None, STEPS),
    *_both("gradient_clip_val", "trainer.gradient_clip_val", None, "the global norm"),
    *_both("limit_val_batches", None, (1.0, -1), "validation reads all; trainer.limit_val_prompts takes a number"),
    *_both("limit_train_batches", None, (1.0, -1), "an epoch is the whole data set; trainer.max_steps ends earlier"),
    *_both("inference_metrics.*", None, (), "nothing is generated while training"),
    *_same("trainer.", "log_every_n_steps gradient_clip_val"),
    Row("trainer.max_time", M + "max_time_per_run", None, "a limit of each start, not of their sum"),
    *_ignored("trainer.", "logger enable_checkpointing use_distributed_sampler replace_sampler_ddp", LIGHTNING),
    *_ignored("trainer.", "benchmark enable_model_summary", LIGHTNING),
    Row("trainer.accumulate_grad_batches", None, (1,), "follows from the global and the micro-batch size"),
    # exp_manager
    Row(M + "explicit_log_dir", M + "explicit_log_dir", None, "the run's directory"),
    Row(M + "exp_dir", "run.results_dir", None, "name and version are folders below it; NeMo's `default` is not added"),
    Row(M + "name", M + "name", None, "the run's name; a folder unless explicit_log_dir is set"),
    Row(M + "version", M + "version", None, "NeMo ignores it beside explicit_log_dir, we refuse it"),
    Row(M + "use_datetime_version", None, ANY, "no folder is named after the time"),
    Row(M + "resume_if_exists", M + "resume_if_exists", None, "false refuses to start over checkpoints; NeMo starts"),
    Row(M + "resume_ignore_no_checkpoint", M + "resume_ignore_no_checkpoint", None, "NeMo's default: false"),
    Row(M + "resume_past_end", None, (False,), "a finished run only exports again"),
    Row(M + "resume_from_checkpoint", None, (), "the newest good one of the run's directory is taken"),
    Row("model.resume_from_checkpoint", None, (), "the newest good one of the run's directory is taken"),
    Row(M + "max_time_per_run", M + "max_time_per_run", None, "DD:HH:MM:SS"),
    Row(M + "create_preemption_callback", M + "create_preemption_callback", None, "SIGUSR1 and SIGTERM save and end"),
    *_same(M, "create_tensorboard_logger create_wandb_logger"),
    *_same(M + "wandb_logger_kwargs.", "project name entity group tags offline", "with create_wandb_logger only"),
    Row(M + "wandb_logger_kwargs.resume", None, ANY, "a continued run always continues its W&B run"),
    Row(M + "create_mlflow_logger", M + "create_mlflow_logger"),
    *_same(M + "mlflow_logger_kwargs.", "experiment_name", "with create_mlflow_logger only"),
    *_same(M + "mlflow_logger_kwargs.", "tracking_uri",
           "with create_mlflow_logger only; without it sqlite in the run's directory, not ./mlruns"),
    Row(M + "create_checkpoint_callback", None, (True,), f"{C}every_n_train_steps=null writes none"),
    Row(C + "monitor", C + "monitor", None, "val_loss and the other validation metrics; needs data.validation_path"),
    Row(C + "mode", C + "mode"),
    Row(C + "save_top_k", C + "save_top_k", None, "0 is unsupported"),
    *_same(C, "every_n_train_steps async_save train_time_interval"),
    Row(C + "save_last", None, (True,), "the newest checkpoint is always kept"),
    *_ignored(C, "always_save_nemo save_nemo_on_train_end", HF),
    Row(C + "save_best_model", None, ANY, "with monitor the best checkpoint is the one exported"),
    Row(C + "filename", None, ANY, "checkpoints are named after their step"),
    Row(C + "dirpath", None, (), "checkpoints/ in the run's directory"),
    Row(C + "model_parallel_size", None, ANY, "checkpoints do not depend on the layout"),
    Row(C + "save_on_train_epoch_end", None, OFF, "steps decide"),
    Row(C + "verbose", None, ANY, "saves are always told"),
    Row(M + "create_early_stopping_callback", None, (False,), "patience below asks for it"),
    *_same(M + "early_stopping_callback_params.", "patience min_delta"),
    *_ignored(M, "log_step_timing step_timing_kwargs.*", "every step's time is logged"),
    Row(M + "seconds_to_sleep", None, ANY, "ranks wait for each other"),
    *_ignored(M, "log_local_rank_0_only log_global_rank_0_only", "rank 0 alone speaks"),
    # the model
    Row("pretrained_checkpoint.restore_from_path", None, (), "a .nemo file: model.path is a Hugging Face directory"),
    Row("model.restore_from_path", None, (), "a .nemo file: model.path is a Hugging Face directory"),
    Row("model.seed", "run.seed", None, "seeds the order of the data"),
    Row("model.mcore_gpt", None, (True,), "it is Megatron-core"),
    Row("model.micro_batch_size", "data.micro_batch_size", None, "rows, which hold whole groups"),
    Row("model.global_batch_size", "data.global_batch_size", None, "prompts, not pairs or rows"),
    *_same("model.", "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size"),
    *_same("model.", "context_parallel_size sequence_parallel"),
    Row("model.encoder_seq_length", "data.seq_length", None, "tokens of a row; a pair must fit a micro-batch"),
    *_same("model.", "make_vocab_size_divisible_by"),
    Row("model.transformer_engine", "model.transformer_impl", {True: "transformer_engine", False: "local"}),
    Row("model.megatron_amp_O2", None, ANY, "bf16 always has fp32 master weights in the optimizer"),
    Row("model.activations_checkpoint_granularity", "model.recompute_granularity",
        {"selective": "selective", "full": "full"}, "null is none"),
    Row("model.activations_checkpoint_num_layers", "model.recompute_num_layers", None, "with full only"),
    Row("model.activations_checkpoint_method", None, ("uniform",), "`block` is unsupported"),
    Row("model.activations_checkpoint_layers_per_pipeline", None, ()),
    Row("model.max_position_embeddings", None, ANY, FIXED),
    Row("model.seq_len_interpolation_factor", None, (), FIXED),
    Row("model.use_flash_attention", None, ANY, "Transformer Engine chooses its kernel"),
    *(Row(f"model.{kind}_dropout", None, OFF, "there is no dropout") for kind in ("hidden", "attention", "ffn")),
    Row("model.answer_only_loss", None, ANY, "responses and their end of turn are scored, nothing else"),
    *_ignored("model.", "sync_batch_comm gradient_as_bucket_view", "no such switch"),
    Row("model.save_nemo_on_validation_end", None, ANY, HF),
    Row("model.peft.peft_scheme", "adapter.kind", {"none": "none", "lora": "lora"}),
    Row("model.peft.lora_tuning.adapter_dim", "adapter.rank"),
    Row("model.peft.lora_tuning.alpha", "adapter.alpha"),
    Row("model.peft.lora_tuning.adapter_dropout", "adapter.dropout"),
    Row("model.peft.lora_tuning.target_modules", None, (), "adapter.targets takes Hugging Face names"),
    Row("model.peft.restore_from_path", None, (), "adapter.path, a PEFT directory"),
    Row("model.peft.*", None, ANY, "read with model.peft.peft_scheme only"),
    Row("model.steerlm", None, (), "no SteerLM"),
    Row("model.steerable_attributes.*", None, ANY, "read by SteerLM only"),
    Row("model.inference.*", None, ANY, "nothing is generated while training"),
    Row("model.overwrite_base_config.*", None, ANY, "no base config is merged"),
    # the loss
    Row("model.dpo.preference_loss", "objective.loss", LOSSES, "with preference_average_log_probs: dpo becomes ln_dpo"),
    Row("model.dpo.preference_average_log_probs", None, (True, False), "ln_dpo, objective.length_normalized"),
    Row("model.dpo.ref_policy_kl_penalty", "objective.beta"),
    Row("model.dpo.preference_loss_weight", None, (1, 1.0), "the SFT term has a weight, this one none"),
    Row("model.dpo.sft_loss_weight", "objective.rpo_alpha", None, "0 becomes null; the chosen response's mean NLL"),
    Row("model.dpo.sft_average_log_probs", None, ANY, "false is unsupported where sft_loss_weight is not 0"),
    Row("model.dpo.log_prob_forward_micro_batch_size", None, ANY, "policy and reference see the same rows"),
    Row("model.dpo.gt_reward_scale", None, ANY, "read by rpo_* only"),
    # the data
    *(Row(f"{D}train_ds.{key}", None, (), FUSED) for key in ("file_path", "file_names")),
    *(Row(f"{D}validation_ds.{key}", None, (), "data.validation_path, built likewise") for key in (
        "file_path", "file_names")),
    *(Row(D + key, None, (), FUSED) for key in ("data_prefix", "data_prefix.*")),
    Row(D + "train_ds.global_batch_size", "data.global_batch_size", None, "prompts, not rows"),
    Row(D + "train_ds.micro_batch_size", "data.micro_batch_size", None, "rows, which hold whole groups"),
    Row(D + "train_ds.shuffle", "data.shuffle"),
    Row(D + "train_ds.max_seq_length", None, ANY, f"{BUILT} max_length=..."),
    Row(D + "train_ds.min_seq_length", None, (0, 1), "no response is too short"),
    Row(D + "train_ds.drop_last", None, ANY, "the last batch is filled with prompts of weight 0"),
    Row(D + "train_ds.concat_sampling_probabilities", None, (), FUSED),
    Row(D + "train_ds.packed_sequence", "data.packing.enabled"),
    *_ignored(D + "train_ds.", "label_key add_eos add_sep add_bos prompt_template truncation_field", TEMPLATE),
    *_ignored(D + "train_ds.", "truncation_method", TEMPLATE),
    *_ignored(D + "train_ds.", "memmap_workers index_mapping_dir hf_dataset", BUILT),
    Row(D + "validation_ds.*", None, ANY, "validation takes the settings of training"),
    *_ignored(D, "chat chat_prompt_tokens.*", TEMPLATE),
    Row(D + "sample", None, ANY, "trainer.max_epochs repeats the data"),
    Row(D + "num_workers", None, ANY, "rows are laid out in the training process"),
    Row(D + "dataloader_type", None, ("single",), "the order is a function of seed and epoch"),
    Row(D + "seq_length", "data.seq_length", None, "tokens of a row; a pair must fit a micro-batch"),
    Row(D + "data_impl", None, ANY, BUILT),
    Row(D + "splits_string", None, (), FUSED),
    Row(D + "pad_length_to_multiple_of", None, ANY, "rows are packed and of fixed length"),
    *_ignored(D, "skip_warmup index_mapping_dir", BUILT),
    Row(D + "reset_position_ids", None, ANY, "positions always start anew in a packed row"),
    Row(D + "reset_attention_mask", None, ANY, "no response sees another one's"),
    Row(D + "eod_mask_loss", None, OFF, "the end of turn is scored"),
    *_ignored(D, "default_chosen_reward default_rejected_reward", "read by rpo_* only; records carry their rewards"),
    # the optimizer
    Row("model.optim.name", "optim.use_distributed_optimizer", OPTIMIZERS, "AdamW, with its state split or not"),
    *(Row(f"model.optim.{key}", f"optim.{key}") for key in ("lr", "weight_decay", "betas", "eps")),
    Row("model.optim.overlap_grad_sync", "optim.overlap_grad_reduce"),
    Row("model.optim.overlap_param_sync", "optim.overlap_param_gather"),
    Row("model.optim.bucket_cap_mb", None, ANY, "core's bucket size"),
    Row("model.optim.contiguous_grad_buffer", None, ANY, "core's are contiguous"),
    Row("model.optim.sched.name", "optim.sched.name", SCHEDULES),
    *(Row(f"model.optim.sched.{key}", f"optim.sched.{key}") for key in ("warmup_steps", "warmup_ratio", "min_lr")),
    Row("model.optim.sched.constant_steps", None, OFF, "the decay ends with the run, not steps before it"),
    Row("model.optim.sched.max_steps", None, (), "the decay ends with the run"),
)
# fmt: on
