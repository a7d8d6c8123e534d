"""Shipped presets: the layout fits the GPUs and the model, and the memory written beside it is what follows."""

import re
from types import SimpleNamespace

import pytest

from fuserl_megatron.config.compose import conf_dir
from fuserl_megatron.config.load import load_config
from fuserl_megatron.config.validate import validate
from fuserl_megatron.convert.peft import layer_parameters
from fuserl_megatron.util.errors import UserError

PRESETS = sorted((conf_dir() / "preset").glob("*.yaml"))
SHAPES = {
    "8b": SimpleNamespace(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32),
    "70b": SimpleNamespace(num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64),
}
for shape in SHAPES.values():
    vars(shape).update(num_query_groups=8, head_dim=128, vocab_size=128256, max_position_embeddings=131072)


def parameters(shape):
    layer = shape.hidden_size * (2 * shape.hidden_size + 2 * 1024 + 3 * shape.ffn_hidden_size + 2)
    return shape.num_layers * layer + 2 * shape.vocab_size * shape.hidden_size


def states_gb(config, shape, data_parallel):
    """Weights and gradients of one rank, master weights and moments split over the data-parallel ranks."""
    model = config.model
    own = parameters(shape) / (model.tensor_model_parallel_size * model.pipeline_model_parallel_size)
    size = {"fp32": 4, "bf16": 2}
    moments = size[config.optim.exp_avg_dtype] + size[config.optim.exp_avg_sq_dtype]
    optimizer = moments + size[config.optim.main_params_dtype]
    assert config.optim.use_distributed_optimizer
    if config.adapter.kind == "lora":
        cut, whole = layer_parameters(shape, config.adapter)
        adapter = shape.num_layers * (cut / model.tensor_model_parallel_size + whole)
        return (2 * own + adapter * (2 + 4 + optimizer / data_parallel)) / 1e9
    return own * (2 + 4 + optimizer / data_parallel) / 1e9


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
@pytest.mark.parametrize("recipe", [None, "llama31_8b_fusepo_dpo"])
def test_preset(file, recipe):
    size, lora, gpus = re.fullmatch(r"llama31_(\d+b)_(lora_)?(\d+)gpu", file.stem).groups()
    chosen = [f"preset={file.stem}", *([f"recipe={recipe}"] if recipe else [])]
    config = load_config("train", ["model.path=/m", "data.path=/d", "trainer.accelerator=gpu", *chosen])
    shape, world, text = SHAPES[size], int(gpus), file.read_text()
    facts = validate(config, world, shape)
    data_parallel = int(re.search(r"DP (\d+) =", facts[0])[1])
    product = re.search(r"layout +(\d+) = TP (\d+) x PP (\d+) x DP (\d+)", text)
    model = config.model
    sizes = [world, model.tensor_model_parallel_size, model.pipeline_model_parallel_size, data_parallel]
    assert [int(n) for n in product.groups()] == sizes
    assert config.data.global_batch_size % data_parallel == 0
    assert model.tensor_model_parallel_size <= 8  # inside a node
    written = int(re.search(r"states.* = (\d+) GB", text)[1])
    assert written == round(states_gb(config, shape, data_parallel))
    assert written < (141 if gpus == "1" and not lora else 80)
    assert (config.adapter.kind == "lora") == bool(lora) and (not lora or config.optim.lr > 4e-6)
    if world == 1:
        return  # one rank divides everything
    with pytest.raises(UserError):
        validate(config, world, SimpleNamespace(**vars(shape) | dict(ffn_hidden_size=14335, num_layers=79)))


def test_all_presets_are_here():
    assert [file.stem for file in PRESETS] == [
        "llama31_70b_32gpu",
        "llama31_70b_64gpu",
        "llama31_70b_lora_8gpu",
        "llama31_8b_1gpu",
        "llama31_8b_8gpu",
        "llama31_8b_lora_1gpu",
    ]
