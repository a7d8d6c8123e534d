"""FP8 and optimizer states as core is asked for them, on a machine that has neither CUDA nor Transformer Engine."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from fuserl_megatron.config.derived import row_length
from fuserl_megatron.config.layout_rules import check_model
from fuserl_megatron.config.schema import Config, DataConfig, ModelConfig, OptimConfig, TrainerConfig
from fuserl_megatron.convert.family import Traits
from fuserl_megatron.mcore import model, optimizer, precision
from fuserl_megatron.mcore.parallel import Layout
from fuserl_megatron.util.errors import UserError

SHAPE = SimpleNamespace(
    attention_out_bias=False, mlp_bias=False, num_layers=4, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4,
    num_query_groups=2, head_dim=64, rms_norm_eps=1e-5, qk_norm=False, qkv_bias=False, tie_word_embeddings=False,
    vocab_size=1024, max_position_embeddings=512, traits=Traits(),
)  # fmt: skip
ONE = dict(tp_size=1, tp_rank=0, pp_size=1, pp_rank=0, cp_size=1, cp_rank=0, dp_size=1, dp_rank=0, vpp_size=None)
CUDA = torch.device("cuda", 0)


def core_config(name, fp8_params=False):
    layout = Layout(device=CUDA, rank=0, world_size=1, **ONE)
    return model.transformer_config(SHAPE, ModelConfig(fp8_params=fp8_params), layout, torch.bfloat16, True, name)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("bf16", (None, False)),
        ("fp8_delayed", ("hybrid", "delayed")),
        ("fp8_current", ("hybrid", "tensorwise")),
        ("fp8_blockwise", ("e4m3", "blockwise")),
        ("fp8_mxfp8", ("e4m3", "mxfp8")),
    ],
)
def test_recipes_by_name(name, expected):
    config = core_config(name)
    assert (config.fp8, config.fp8 and config.fp8_recipe) == (expected if config.fp8 else (None, None))
    assert config.bf16 and config.params_dtype == torch.bfloat16 and not config.fp8_param
    if name == "fp8_delayed":
        assert (config.fp8_margin, config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (0, 1024, "max")
    if name != "bf16":
        assert core_config(name, fp8_params=True).fp8_param
    assert precision.parameter_dtype(name) == torch.bfloat16 and precision.parameter_dtype("32") == torch.float32


@pytest.mark.parametrize("name", precision.RECIPES)
def test_asking_for_fp8_where_it_is_not_is_one_clear_error(name):
    with pytest.raises(UserError, match=f"trainer.precision={name}: FP8 needs .* on the CPU; trainer.precision=bf16"):
        precision.check_fp8(name, torch.device("cpu"), use_te=True)
    with pytest.raises(UserError, match="core's local layers"):
        precision.check_fp8(name, CUDA, use_te=False)


@pytest.mark.parametrize("name", precision.RECIPES)
def test_hopper_has_all_recipes_but_mxfp8(name):
    hopper = dict(get_device_capability=lambda _: (9, 0), get_device_name=lambda _: "NVIDIA H200")
    with mock.patch.multiple(torch.cuda, **hopper):
        if name == "fp8_mxfp8":
            with pytest.raises(UserError, match="Blackwell has and Hopper has not, .* H200; .*=fp8_blockwise would"):
                precision.check_fp8(name, CUDA, use_te=True)
        else:
            precision.check_fp8(name, CUDA, use_te=True)


@pytest.mark.parametrize("name, inside", [("fp8_delayed", None), ("fp8_current", "hybrid"), ("bf16", None)])
def test_scoring_leaves_the_amax_state_alone(name, inside):
    config = core_config(name)
    before = config.fp8
    with pytest.raises(ZeroDivisionError), precision.scoring(config):
        assert config.fp8 == inside
        1 / 0  # noqa: B018
    assert config.fp8 == before


@pytest.mark.parametrize(
    "name, rows, cp, tp, expected",
    [
        ("bf16", 1, 1, 1, 1001),
        ("fp8_current", 1, 1, 1, 1008),
        ("fp8_current", 4, 1, 1, 1004),
        ("fp8_blockwise", 1, 1, 1, 1024),
        ("fp8_blockwise", 2, 2, 4, 1024),
        ("fp8_mxfp8", 1, 2, 4, 1024),
    ],
)
def test_rows_are_rounded_up_for_the_user(name, rows, cp, tp, expected):
    sizes = dict(context_parallel_size=cp, tensor_model_parallel_size=tp, sequence_parallel=tp > 1)
    config = Config(
        trainer=TrainerConfig(precision=name),
        model=ModelConfig(**sizes),
        data=DataConfig(seq_length=1001, micro_batch_size=rows),
    )
    length = row_length(config)
    assert length == expected
    if name != "bf16":
        assert rows * length % (cp * tp * {"fp8_current": 16, "fp8_blockwise": 128, "fp8_mxfp8": 32}[name]) == 0


def test_a_model_whose_sizes_do_not_fit_is_refused():
    config = Config(trainer=TrainerConfig(precision="fp8_blockwise"))
    check_model(config, SHAPE, None)
    odd = SimpleNamespace(**vars(SHAPE) | dict(hidden_size=576))
    with pytest.raises(UserError, match="multiples of 128, and the model's hidden size is 576"):
        check_model(config, odd, None)


def built(optim, name="bf16"):
    """What core's optimizer is made with."""
    wrapped = [SimpleNamespace(config=core_config(name))]
    with (
        mock.patch.object(optimizer, "OptimizerConfig", side_effect=lambda **fields: fields) as core,
        mock.patch.object(optimizer, "get_megatron_optimizer"),
        mock.patch.object(optimizer, "_have_te_adam", return_value=True),
    ):
        optimizer.build_optimizer(wrapped, optim, TrainerConfig(precision=name), torch.bfloat16)
    return core.call_args.kwargs


AWARE = OptimConfig(
    use_distributed_optimizer=True, use_precision_aware_optimizer=True, exp_avg_dtype="fp8", exp_avg_sq_dtype="bf16"
)


def test_optimizer_states_as_asked_for():
    plain = built(OptimConfig())
    assert plain["fp8_recipe"] is None and "exp_avg_dtype" not in plain
    fields = built(AWARE, "fp8_current")
    assert fields["fp8_recipe"] == "tensorwise" and fields["use_precision_aware_optimizer"]
    dtypes = [fields[f"{state}_dtype"] for state in ("main_params", "exp_avg", "exp_avg_sq")]
    assert dtypes == [torch.float32, torch.uint8, torch.bfloat16]
    assert not fields["store_param_remainders"]  # checkpoints would hold halves of master weights
    assert not fields["optimizer_cpu_offload"] and fields["optimizer_offload_fraction"] == 0
    fields = built(dataclasses.replace(AWARE, optimizer_cpu_offload=True, optimizer_offload_fraction=0.5))
    assert fields["optimizer_cpu_offload"] and fields["optimizer_offload_fraction"] == 0.5
    names = {field.name for field in dataclasses.fields(optimizer.OptimizerConfig)}
    assert set(fields) <= names  # core has them all


def test_precision_aware_states_without_transformer_engine_are_refused():
    wrapped = [SimpleNamespace(config=core_config("bf16"))]
    with pytest.raises(UserError, match="needs Transformer Engine's Adam, and transformer-engine is not installed"):
        optimizer.build_optimizer(wrapped, AWARE, TrainerConfig(), torch.bfloat16)
    with (
        mock.patch.object(optimizer, "have_transformer_engine", return_value=True),
        pytest.raises(UserError, match="Engine's Adam, and this run is on the CPU: optim.use_precision_aware"),
    ):
        optimizer.build_optimizer(wrapped, AWARE, TrainerConfig(), torch.bfloat16)
