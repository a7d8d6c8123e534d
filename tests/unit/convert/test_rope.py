"""RoPE frequencies equal transformers' to the last bit in fp32."""

import random

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.convert.rope import rope_inverse_frequencies


def random_fields(kind, draw):
    """RoPE fields a config of that type might have; optional ones present in half of the cases."""
    sometimes = {}
    fields = {"rope_type": kind, "rope_theta": draw.choice([100.0, 10000, 10000.0, 500000.0, 1e6, 12345.678])}
    if kind != "default":
        fields["factor"] = draw.choice([1.0, 2, 4.0, 8.0, 32.0, 3.7])
    if kind == "llama3":
        fields |= {"low_freq_factor": draw.choice([1, 1.0, 2.0]), "high_freq_factor": draw.choice([4, 4.0, 8.5])}
        fields["original_max_position_embeddings"] = draw.choice([64, 1000, 8192])
    if kind == "yarn":
        sometimes = {
            "attention_factor": 0.75,
            "beta_fast": draw.choice([32, 16.0, 20]),
            "beta_slow": draw.choice([1, 2.0]),
            "mscale": draw.choice([0.707, 1.0]),
            "mscale_all_dim": draw.choice([1.0, 0.8]),
            "truncate": False,
        }
        fields["original_max_position_embeddings"] = draw.choice([64, 2048, 4096])
    return fields | {name: value for name, value in sometimes.items() if draw.random() < 0.5}


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "llama3"])
def test_frequencies_are_those_of_transformers_bit_for_bit(make_config, kind):
    draw = random.Random(f"rope {kind}")
    for _ in range(60):
        heads, head_dim = 4, draw.choice([4, 6, 16, 64, 80, 128, 256])
        positions = draw.choice([128, 2048, 131072])
        config = make_config(
            num_attention_heads=heads,
            hidden_size=heads * head_dim,
            head_dim=head_dim,
            max_position_embeddings=positions,
            rope_parameters=random_fields(kind, draw),
        )
        del config["rope_theta"]
        theirs = AutoConfig.for_model(**config)
        ours = read_config(config).rope
        expected = LlamaRotaryEmbedding(theirs)
        actual, scaling = rope_inverse_frequencies(ours, head_dim)
        assert actual.dtype == torch.float32 and actual.shape == (head_dim // 2,)
        assert torch.equal(actual, expected.inv_freq), config
        assert scaling == expected.attention_scaling
        if kind != "default":
            for length in (None, 1, positions, *([] if kind == "dynamic" else [positions + 1, 3 * positions])):
                expected_freq, expected_scaling = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=length)
                assert torch.equal(actual, expected_freq) and scaling == expected_scaling, (config, length)


def test_dynamic_is_unscaled_up_to_the_models_length_as_in_the_running_module(make_config):
    config = make_config(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    module, ours = LlamaRotaryEmbedding(AutoConfig.for_model(**config)), read_config(config).rope
    actual, _ = rope_inverse_frequencies(ours, 6)
    assert torch.equal(actual, rope_inverse_frequencies(read_config(make_config()).rope, 6)[0])
    for length, is_ours in ((40, True), (128, True), (300, False), (50, True)):
        module(torch.zeros(1), torch.arange(length)[None])
        assert torch.equal(actual, module.inv_freq) == is_ours, length


@pytest.mark.parametrize("inside", [{}, {"original_max_position_embeddings": 100}])
@pytest.mark.parametrize("beside", [{}, {"original_max_position_embeddings": 32}])
def test_the_original_length_is_found_where_transformers_finds_it(make_config, inside, beside):
    fields = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0} | inside
    config = make_config(head_dim=64, rope_parameters=fields, **beside)
    expected = LlamaRotaryEmbedding(AutoConfig.for_model(**(config | {"rope_parameters": dict(fields)})))
    actual, _ = rope_inverse_frequencies(read_config(config).rope, 64)
    assert torch.equal(actual, expected.inv_freq)


def test_a_null_yarn_factor_is_the_ratio_of_the_context_lengths(make_config):
    fields = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    config = make_config(rope_parameters=fields)
    expected = LlamaRotaryEmbedding(AutoConfig.for_model(**config))
    actual, scaling = rope_inverse_frequencies(read_config(config).rope, 6)
    assert torch.equal(actual, expected.inv_freq) and scaling == expected.attention_scaling


@pytest.mark.parametrize("field", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_each_llama3_field_matters(make_config, field):
    # The negative control: a field that was dropped would pass every other comparison with stock values.
    fields = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    fields["original_max_position_embeddings"] = 64
    changed = fields | {field: fields[field] * 2 if field != "low_freq_factor" else 1.5}
    a, b = (read_config(make_config(rope_parameters=f)).rope for f in (fields, changed))
    assert not torch.equal(rope_inverse_frequencies(a, 64)[0], rope_inverse_frequencies(b, 64)[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        None,
    ],
)
def test_the_older_spelling_reads_the_same(make_config, fields):
    old = make_config(rope_theta=5000.0, rope_scaling=fields)
    expected = LlamaRotaryEmbedding(AutoConfig.for_model(**make_config(rope_theta=5000.0, rope_scaling=fields)))
    new = make_config(rope_parameters=(fields or {}) | {"rope_theta": 5000.0})
    del new["rope_theta"]
    assert read_config(old).rope == read_config(new).rope
    actual, scaling = rope_inverse_frequencies(read_config(old).rope, 6)
    assert torch.equal(actual, expected.inv_freq) and scaling == expected.attention_scaling
