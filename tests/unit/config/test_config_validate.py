# ruff: noqa: E501  (tables of one case a line)
from types import SimpleNamespace

import pytest

from fuserl_megatron.config.load import load_config
from fuserl_megatron.config.objective import with_loss_defaults
from fuserl_megatron.config.validate import validate, validate_build
from fuserl_megatron.util.errors import UserError

LLAMA_8B = SimpleNamespace(
    num_layers=32,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    max_position_embeddings=131072,
)
SMOLLM2 = SimpleNamespace(
    num_layers=30,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    vocab_size=49152,
    max_position_embeddings=8192,
)
DATA_SET = SimpleNamespace(num_prompts=1000, max_token_id=49151, tokens={"total_max": 2048.0})
TP, PP = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"


def config(*overrides):
    return load_config("train", ["model.path=/m", "data.path=/d", *overrides])


def error_of(*overrides, world_size=1, shape=None, **keywords):
    with pytest.raises(UserError) as caught:
        validate(config(*overrides), world_size, shape, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_hold():
    validate(config(), 1, LLAMA_8B, data_set=DATA_SET)


@pytest.mark.parametrize(
    ("overrides", "world_size", "shape", "expected"),
    [
        ([f"{TP}=2"], 2, SMOLLM2, f"{TP}=2: does not divide the model's 9 attention heads; {TP}=1 would work."),
        ([f"{TP}=9"], 9, SMOLLM2, f"{TP}=9: does not divide the model's 3 key/value heads; {TP}=3 would work."),
        ([f"{TP}=16"], 16, LLAMA_8B, f"{TP}=16: does not divide the model's 8 key/value heads; {TP}=8 would work."),
        ([f"{TP}=4"], 4, SimpleNamespace(**vars(LLAMA_8B) | {"ffn_hidden_size": 42}), f"{TP}=4: does not divide the model's 42 MLP channels; {TP}=2 would work."),
        ([f"{PP}=4"], 4, SMOLLM2, f"{PP}=4: does not divide the model's 30 layers; {PP}=3 would work."),
        ([f"{TP}=2", f"{PP}=2"], 6, LLAMA_8B, "world size 6: must be a multiple of TP 2 x PP 2 x CP 1 = 4; --nproc 4 or 8 would work."),
        ([f"{TP}=8"], 4, LLAMA_8B, "world size 4: must be a multiple of TP 8 x PP 1 x CP 1 = 8; --nproc 8 would work."),
        (["model.context_parallel_size=2", "data.seq_length=1002"], 2, None, "data.seq_length=1002: model.context_parallel_size=2 cuts a row into 4 chunks, so that it must be a multiple of 4; data.seq_length=1004 would work."),
        (["model.context_parallel_size=2", f"{TP}=4", "model.sequence_parallel=true", "data.seq_length=1004"], 8, None, "data.seq_length=1004: model.context_parallel_size=2 cuts a row into 4 chunks and model.sequence_parallel splits it over 4 ranks, so that it must be a multiple of 8; data.seq_length=1008 would work."),
        (["model.virtual_pipeline_model_parallel_size=2"], 2, None, "model.virtual_pipeline_model_parallel_size=2: virtual stages interleave"),
        (["model.virtual_pipeline_model_parallel_size=1"], 2, None, "model.virtual_pipeline_model_parallel_size=1: must be at least 2, or null"),
        ([f"{PP}=4", "model.virtual_pipeline_model_parallel_size=3"], 4, LLAMA_8B, "model.virtual_pipeline_model_parallel_size=3: does not divide the 8 layers of a pipeline stage; model.virtual_pipeline_model_parallel_size=2 would work."),
        (["model.sequence_parallel=true"], 1, None, f"model.sequence_parallel=true: needs {TP} > 1"),
        (["model.sequence_parallel=true", f"{TP}=2", "data.seq_length=1001"], 2, None, "data.seq_length=1001: model.sequence_parallel splits"),
    ],
)  # fmt: skip
def test_layout_and_model(overrides, world_size, shape, expected):
    assert error_of(*overrides, world_size=world_size, shape=shape).startswith(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.micro_batch_size=0"], "data.micro_batch_size=0: must be at least 1; data.micro_batch_size=1 would work."),
        (["data.global_batch_size=-1"], "data.global_batch_size=-1: must be at least 1"),
        ([f"{TP}=0"], f"{TP}=0: must be at least 1"),
        (["exp_manager.profile_steps=[3]"], "exp_manager.profile_steps=[3]: must be a first and a last step"),
        (["exp_manager.profile_steps=[3,2]"], "exp_manager.profile_steps=[3,2]: must be a first and a last step"),
        (["exp_manager.profile_dir=/x"], "exp_manager.profile_dir=/x: is used with exp_manager.profile_steps only"),
        (["optim.lr=0"], "optim.lr=0.0: must be a positive number"),
        (["optim.lr=inf"], "optim.lr=inf: must be a positive number"),
        (["trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1.0: must not be negative"),
        (["exp_manager.checkpoint_callback_params.save_top_k=0"], "exp_manager.checkpoint_callback_params.save_top_k=0"),
        (["data.seq_length=1"], "data.seq_length=1: a row must hold a prompt and a response"),
        (["optim.betas=[0.9,1]"], "optim.betas=[0.9,1.0]: must lie in [0, 1); optim.betas=[0.9,0.95] would work."),
        (["optim.sched.warmup_ratio=1"], "optim.sched.warmup_ratio=1.0: must lie in [0, 1)"),
        (["trainer.max_epochs=null"], "trainer.max_epochs=null: the run would not end"),
        (["optim.sched.min_lr=1e-3"], "optim.sched.min_lr=0.001: must not be above optim.lr=5e-06"),
        (["optim.sched.name=constant", "optim.sched.min_lr=1e-7"], "optim.sched.min_lr=1e-07: optim.sched.name=constant"),
        (["optim.overlap_param_gather=true"], "optim.overlap_param_gather=true: needs optim.use_distributed_optimizer=true"),
        (["trainer.max_epochs=null", "trainer.max_steps=10", "optim.sched.warmup_steps=10"], "optim.sched.warmup_steps=10: must be smaller than the run's 10 steps; optim.sched.warmup_steps=1 would work."),
        (["trainer=cpu", "model.transformer_impl=transformer_engine"], "model.transformer_impl=transformer_engine: Transformer Engine needs CUDA"),
        (["trainer=cpu", "model.attention_backend=flex"], "model.attention_backend=flex: needs CUDA"),
        (["model.attention_backend=te"], "model.attention_backend=te: Transformer Engine's packed attention knows no shared prefix"),
        (["model.attention_backend=te", "data.packing.share_prefix=off", "model.context_parallel_size=2"], "model.attention_backend=te: is not offered with context"),
        (["trainer=cpu", "trainer.precision=fp8_current"], "trainer.precision=fp8_current: FP8 needs Transformer Engine on CUDA; this run is on the CPU; trainer.precision=bf16 would work."),
        (["trainer.precision=fp8_current", "model.transformer_impl=local"], "model.transformer_impl=local: trainer.precision=fp8_current needs"),
        (["model.fp8_params=true"], "model.fp8_params=true: is used with trainer.precision=fp8_* only"),
        (["trainer.precision=fp8_current", "model.fp8_params=true"], "model.fp8_params=true: needs optim.use_distributed_optimizer=true"),
        (["optim.use_precision_aware_optimizer=true"], "optim.use_precision_aware_optimizer=true: needs optim.use_distributed"),
        (["trainer=cpu", "optim.use_precision_aware_optimizer=true"], "optim.use_precision_aware_optimizer=true: Transformer Engine's Adam needs CUDA"),
        (["optim.exp_avg_dtype=bf16"], "optim.exp_avg_dtype=bf16: is used with optim.use_precision_aware_optimizer=true only"),
        (["optim.optimizer_cpu_offload=true"], "optim.optimizer_cpu_offload=true: is used with optim.use_precision_aware"),
        (["optim.optimizer_offload_fraction=0.5"], "optim.optimizer_offload_fraction=0.5: is used with optim.optimizer_cpu_offload=true"),
        (["model.recompute_num_layers=2"], "model.recompute_num_layers=2: is used with model.recompute_granularity=full only"),
        (["data.packing.enabled=false", "data.packing.share_prefix=on"], "data.packing.share_prefix=on: data.packing.enabled=false"),
        (["adapter.rank=8"], "adapter.rank=8: is used with adapter.kind=lora only; adapter.rank=16 would work."),
        (["adapter=lora", "adapter.rank=0"], "adapter.rank=0: must be at least 1"),
        (["adapter=lora", "adapter.alpha=0"], "adapter.alpha=0.0: must be a positive number"),
        (["adapter=lora", "adapter.dropout=0.1"], "adapter.dropout=0.1: must be 0: nothing in training is random; adapter.dropout=0.0 would work."),
        (["adapter=lora", "adapter.targets=[]"], "adapter.targets=[]: must name each layer once, and at least one; adapter.targets=[q_proj] would work."),
        (["adapter=lora", "adapter.targets=[q_proj,q_proj]"], "adapter.targets=[q_proj,q_proj]: must name each layer once"),
        (["adapter=lora", "trainer.precision=fp8_current"], "trainer.precision=fp8_current: LoRA in FP8 has never been run; trainer.precision=bf16 would work."),
        (["objective=fusepo_dpo", "objective.reference_mode=adapter"], "objective.reference_mode=adapter: there is no adapter to switch off (adapter.kind=none); objective.reference_mode=cache would work."),
        (["adapter=lora", "objective=fusepo_dpo", "objective.reference_mode=adapter", "objective.reference=/r"], "objective.reference_mode=adapter: without its adapter the model is model.path, not objective.reference"),
    ],
)  # fmt: skip
def test_settings(overrides, expected):
    assert error_of(*overrides).startswith(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.beta=0.1"], "objective.beta=0.1: belongs to objective.stage=fusepo, and this run's stage is fusesft; objective.beta=null would work."),
        (["objective.loss=dpo"], "objective.loss=dpo: belongs to objective.stage=fusepo"),
        (["objective.reference=/r"], "objective.reference=/r: belongs to objective.stage=fusepo"),
        (["objective=fusepo_dpo", "objective.selection=per_source"], "objective.selection=per_source: belongs to objective.stage=fusesft"),
        (["objective=fusepo_dpo", "objective.nll_reduction=token_sum"], "objective.nll_reduction=token_sum: belongs to"),
        (["objective.top_m=4"], "objective.top_m=4: is used with objective.selection=top_m only"),
        (["objective.selection=top_m", "objective.top_m=0"], "objective.top_m=0: must be at least 1"),
        (["objective.stage=fusepo"], "objective.loss=null: objective.stage=fusepo needs a loss; objective.loss=ln_dpo would work."),
        (["objective=fusepo_dpo", "objective.beta=0"], "objective.beta=0.0: must be a positive number"),
        (["objective=fusepo_dpo", "objective.min_reward_gap=-1"], "objective.min_reward_gap=-1.0: must not be negative"),
        (["objective=fusepo_dpo", "objective.min_reward_gap=2", "objective.max_reward_gap=1"], "objective.min_reward_gap=2.0: no pair is above it"),
    ],
)  # fmt: skip
def test_objective(overrides, expected):
    assert error_of(*overrides).startswith(expected)


def test_the_reference_of_an_adapter_is_the_model_without_it():
    for words, mode in (
        ([], "adapter"),
        (["objective.reference=/r"], "cache"),
        (["objective.reference_mode=cache"], "cache"),
    ):
        objective = with_loss_defaults(config("adapter=lora", "objective=fusepo_dpo", *words)).objective
        assert objective.reference_mode == mode
    assert with_loss_defaults(config("objective=fusepo_dpo")).objective.reference_mode == "cache"
    assert with_loss_defaults(config("adapter=lora")).objective.reference_mode is None
    with pytest.raises(UserError, match="adapter.targets=lm_head: not one of q_proj"):
        config("adapter=lora", "adapter.targets=[lm_head]")


def test_what_needs_cuda_is_refused_on_the_cpu_alone():
    override = "model.transformer_impl=transformer_engine"
    for accelerator in ("gpu", "auto"):
        assert validate(config(override, f"trainer.accelerator={accelerator}"), 1)
    assert "needs CUDA" in error_of(override, "trainer.accelerator=cpu")


def test_data_set_and_model_belong_together():
    foreign = SimpleNamespace(num_prompts=10, max_token_id=128000, tokens={"total_max": 9})
    assert "holds token 128000" in error_of(shape=SMOLLM2, data_set=foreign)
    long = SimpleNamespace(num_prompts=10, max_token_id=1, tokens={"total_max": 9000.0})
    expected = (
        "longest prompt + response has 9000 tokens, and the model's max_position_embeddings is 8192; build it with"
    )
    assert expected in error_of(shape=SMOLLM2, data_set=long)
    assert error_of("data.validation_path=/v", "trainer.val_check_interval=5", shape=SMOLLM2, held_out=long).startswith(
        "data.validation_path=/v: its"
    )
    # a long row of many short sequences is no long sequence
    assert validate(config("data.seq_length=16384"), 1, SMOLLM2, data_set=DATA_SET)


def test_facts():
    recipe = config("recipe=llama31_8b_fusesft")
    layout, batch, steps = validate(
        recipe, 8, LLAMA_8B, data_set=SimpleNamespace(**{**vars(DATA_SET), "max_token_id": 1})
    )
    assert layout == "layout   TP 2 x PP 1 x CP 1 x DP 4 = 8 ranks, sequence parallel"
    assert (
        batch == "batch    128 prompts a step = 32 on each of 4 data-parallel ranks; micro-batch 1 x 2048 = 2048 tokens"
    )
    assert steps == "steps    24 (1000 prompts / 128 = 8 a pass x 3), 3 of them warm-up"
    assert validate(config("trainer.max_steps=5"), 3, data_set=DATA_SET)[1:] == [
        "batch    128 prompts a step = up to 43 on each of 3 data-parallel ranks; micro-batch 1 x 2048 = 2048 tokens",
        "steps    5 (trainer.max_steps=5), 1 of them warm-up",
    ]
    assert len(validate(config(), 1)) == 2, "without the data set the number of steps is not known"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["inputs=[]"], "inputs=[]: needs at least one file"),
        (
            ["reward_temperature=-1"],
            "reward_temperature=-1.0: must be positive, 0 (best source alone), inf (uniform) or auto",
        ),
        (["reward_temperature=auto"], "reward_temperature=auto: needs one of reward_accuracy=0.75"),
        (["reward_accuracy=0.75"], "reward_accuracy=0.75: only reward_temperature=auto reads it"),
        (["calibration=p.jsonl"], "calibration=p.jsonl: only reward_temperature=auto reads it"),
        (["second_reward=b"], "second_reward=b: only reward_temperature=auto reads it"),
        (
            ["reward_temperature=auto", "reward_accuracy=0.75", "second_reward=b"],
            "reward_temperature=auto: reads one of reward_accuracy and second_reward, not both",
        ),
        (["reward_temperature=auto", "reward_accuracy=0.5"], "reward_accuracy=0.5: such a reward ranks no better than"),
        (["reward_temperature=auto", "reward_accuracy=-1"], "reward_accuracy=-1.0: such a reward"),
        (["reward_temperature=auto", "reward_accuracy=75"], "reward_accuracy=75.0: is a share, at most 1; reward_acc"),
        (["max_length=1"], "max_length=1: must hold a prompt and a response; max_length=2048 would work."),
        (["sources=[a,a]"], "sources=[a,a]: a source is named twice"),
    ],
)
def test_build_settings(overrides, expected):
    base = ["inputs=[a]", "output=o", "tokenizer=t", "reward_temperature=0.01"]
    validate_build(load_config("build", base))
    with pytest.raises(UserError) as caught:
        validate_build(load_config("build", [*base, *overrides]))
    assert str(caught.value).startswith(expected)
