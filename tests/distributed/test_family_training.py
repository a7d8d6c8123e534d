"""The families' oddities under training: packed rows, shared prefixes, context, tensor and pipeline parallel ranks give
each token's log-probability and every gradient of transformers in float64; and each oddity left out is seen.

The windows are shorter than the sequences, and shorter than a prompt with its response.
"""

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
from family_models import MODELS
from fusion_case import make_case, worst_relative_error
from safetensors.torch import load_file
from test_token_parity import BOUND, config_of, packed, twin

from fuserl_megatron.convert.offline import hf_to_megatron, megatron_to_hf

RUNS = [
    ("mistral", dict(cp=2, share="on"), 2),
    ("smollm3", dict(pp=2, vpp=2, share="on"), 2),
    ("granite", dict(pp=2, share="on"), 2),
    ("phi3", dict(tp=2, share="on"), 2),
    ("olmo2", dict(tp=2, sp=True, recompute="full", share="on"), 2),
    ("gemma2", dict(tp=2, cp=2, sp=True, recompute="selective", share="on"), 4),
    ("gemma3", dict(tp=2, recompute="full", share="on"), 2),
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            paths = make_case(
                tmp_path_factory.mktemp("case"), num_prompts=5, seed=3, tie=name.startswith("gemma"), **MODELS[name]
            )
            made[name] = (paths, twin(paths))
        return made[name]

    return make


def worst(found, expected):
    """Of all log-probabilities, and of all gradients."""
    values, grads = found
    assert values.keys() == expected[0].keys()
    return max(abs(values[key] - expected[0][key]) for key in values), worst_relative_error(grads, expected[1])


@pytest.mark.parametrize("name,changes,world", RUNS, ids=[name for name, *_ in RUNS])
def test_every_token_and_gradient(ranks, cases, name, changes, world):
    paths, expected = cases(name)
    found = ranks.run(packed, world, config_of(paths, changes), len(expected[0]))[0]
    assert max(worst(found, expected)) <= BOUND


@pytest.mark.parametrize("share", ["off", "on"])
@pytest.mark.parametrize("band", [None, 32], ids=["by span", "by band"])
def test_windows_and_caps_in_both_forms(ranks, cases, band, share):
    paths, expected = cases("gemma2")
    found = ranks.run(packed, 1, config_of(paths, dict(share=share)), len(expected[0]), None, band)[0]
    assert max(worst(found, expected)) <= BOUND


def loaded(source, folder, destination):
    """A converted checkpoint through core's own loader into TP 2 x PP 2, and out again."""
    import torch

    from fuserl_megatron.config.schema import ModelConfig, TrainerConfig
    from fuserl_megatron.convert.hf_config import read_config
    from fuserl_megatron.mcore import checkpoint, parallel, weights
    from fuserl_megatron.mcore.model import build_model

    model = ModelConfig(path=source, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    layout = parallel.initialize(model, TrainerConfig(accelerator="cpu", precision="32"))
    target = build_model(read_config(source), model, layout, torch.float32)
    checkpoint.load(target, Path(folder), advice="")
    weights.export_hf(target, layout, destination, source_dir=source, lineage={"target": source})


@pytest.mark.parametrize("name", ["phi3", "olmo2", "gemma2"])
def test_converted_checkpoints_in_both_directions(ranks, cases, tmp_path, name):
    source = cases(name)[0]["policy"]
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    ranks.run(loaded, 4, source, str(tmp_path / "megatron/iter_0000000"), str(tmp_path / "loaded"))
    weights = load_file(f"{source}/model.safetensors")
    for directory in ("back", "loaded"):
        found = load_file(tmp_path / directory / "model.safetensors")
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], weights[key]) for key in weights)


def without(config, num_tokens, traits, shape_fields):
    """`packed` of a model whose family is read without one of its oddities."""
    from fuserl_megatron.mcore import model

    build = model.build_model

    def plainer(shape, *args, **kwargs):
        left = dataclasses.replace(shape.traits, **traits)
        return build(dataclasses.replace(shape, traits=left, **shape_fields), *args, **kwargs)

    with mock.patch("fuserl_megatron.train.feed.build_model", plainer):
        return packed(config, num_tokens)


@pytest.mark.parametrize(
    "name,traits,shape_fields",
    [
        ("mistral", {}, dict(sliding_window=None)),
        ("smollm3", dict(layers_without_rope=frozenset()), {}),
        ("granite", dict(embedding_scale=1.0), {}),
        ("granite", dict(residual_scale=1.0), {}),
        ("granite", dict(attention_scale=None), {}),
        ("granite", dict(logit_scale=1.0), {}),
        ("gemma2", dict(attention_cap=None), {}),
        ("gemma2", dict(logit_cap=None), {}),
        ("gemma2", {}, dict(sliding_layers=frozenset({1, 3}))),
        ("gemma3", {}, dict(local_rope=None)),
        ("gemma3", dict(norm_adds_one=False), {}),
        ("gemma3", dict(activation="silu"), {}),
    ],
    ids=str,
)
def test_an_oddity_left_out_is_seen(ranks, cases, name, traits, shape_fields):
    paths, expected = cases(name)
    found = ranks.run(without, 1, config_of(paths, {}), len(expected[0]), traits, shape_fields)[0]
    assert worst(found, expected)[0] > 100 * BOUND
