"""Toy models with random weights, written as Hugging Face directories without starting transformers.

Legend as in layout.py.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from fuserl_megatron.convert.families import FAMILIES
from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.convert.names import hf_shapes


def make_config(family="llama", **changes):
    """A tiny config.json as a dictionary: 2 layers, 8 query heads on 4 key/value heads, an odd vocabulary."""
    config = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "vocab_size": 53,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    if family in ("mistral", "phi3"):
        config["sliding_window"] = None
    return config | changes


def make_weights(config, seed=0):
    """Random tensors for every name the config calls for."""
    shape = read_config(config)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator).to(shape.dtype) for name, size in hf_shapes(shape).items()}


def write_model(directory, config, weights=None, shards=1, tokenizer=True):
    """Write a model directory with the safetensors library; returns its weights."""
    weights = make_weights(config) if weights is None else weights
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = list(weights)
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        weight_map = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
        for file in files:
            part = {name: weights[name] for name in names if weight_map[name] == file}
            save_file(part, directory / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokenizer:
        (directory / "tokenizer.json").write_text("{}")
        (directory / "tokenizer_config.json").write_text("{}")
        (directory / "chat_template.jinja").write_text("{{ messages }}")
        (directory / "generation_config.json").write_text('{"do_sample": false}')
    return weights


@pytest.fixture(name="make_config")
def make_config_fixture():
    return make_config


@pytest.fixture(name="make_weights")
def make_weights_fixture():
    return make_weights


@pytest.fixture(name="write_model")
def write_model_fixture():
    return write_model
