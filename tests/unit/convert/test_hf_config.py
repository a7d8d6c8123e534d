"""Reading config.json: the same values as transformers, and every unsupported request refused by name."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

from fuserl_megatron.convert.families import FAMILIES
from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.util.errors import UserError

OPTIONAL = ["num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "torch_dtype"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("absent", [*OPTIONAL, "tie_word_embeddings", "architectures"])
def test_absent_fields_take_the_defaults_of_transformers(make_config, family, absent):
    config = make_config(family, num_attention_heads=32, hidden_size=192)
    del config[absent]
    expected, actual = AutoConfig.for_model(**config), read_config(config)
    head_dim = getattr(expected, "head_dim", None) or expected.hidden_size // expected.num_attention_heads
    assert actual.head_dim == head_dim
    assert actual.num_query_groups == expected.num_key_value_heads
    assert actual.max_position_embeddings == expected.max_position_embeddings
    assert actual.rms_norm_eps == expected.rms_norm_eps
    rope = expected.rope_parameters
    if actual.local_rope is not None:
        assert actual.local_rope.theta == rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    assert actual.rope.theta == rope["rope_theta"]
    types = getattr(expected, "layer_types", None)
    if types is not None:
        assert [i in actual.sliding_layers for i in range(2)] == [kind == "sliding_attention" for kind in types]
    assert actual.tie_word_embeddings == expected.tie_word_embeddings
    assert actual.num_layers == expected.num_hidden_layers and actual.ffn_hidden_size == expected.intermediate_size


# Phi-3 has no linear RoPE, Gemma 3 two
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"phi3", "gemma3_text"}))
def test_a_config_saved_by_transformers_reads_back(make_config, tmp_path, family):
    rope = {"rope_type": "linear", "factor": 3.0, "rope_theta": 777.0}
    config = make_config(family, rope_parameters=rope)
    del config["rope_theta"]
    AutoConfig.for_model(**config).save_pretrained(tmp_path)
    shape = read_config(tmp_path)
    assert shape == read_config(config)
    assert (shape.rope.type, shape.rope.theta, shape.rope.factor) == ("linear", 777.0, 3.0)
    assert shape.raw == json.loads((tmp_path / "config.json").read_text())


def test_families_differ_in_biases_and_query_key_norms(make_config):
    def flags(family, **changes):
        shape = read_config(make_config(family, **changes))
        return shape.qkv_bias, shape.attention_out_bias, shape.mlp_bias, shape.qk_norm

    assert flags("llama") == (False, False, False, False)
    assert flags("llama", attention_bias=True) == (True, True, False, False)
    assert flags("llama", mlp_bias=True) == (False, False, True, False)
    assert flags("mistral") == (False, False, False, False)
    assert flags("qwen2") == (True, False, False, False)
    assert flags("qwen3") == (False, False, False, True)
    assert flags("qwen3", attention_bias=True) == (True, True, False, True)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_dtype_in_either_spelling(make_config, field):
    config = make_config()
    del config["torch_dtype"]
    assert read_config(config).dtype is None
    assert read_config(config | {field: "bfloat16"}).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 128}),  # as long as the context: never cuts
        ("mistral", {"sliding_window": 4096}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None}),
        ("qwen2", {"layer_types": ["full_attention", "full_attention"]}),
        ("llama", {"sliding_window": 16}),  # Llama does not read it
        ("llama", {"rope_scaling": None, "attention_dropout": 0.0, "pretraining_tp": 1, "hidden_act": "silu"}),
        ("llama", {"num_key_value_heads": None, "head_dim": None, "hidden_size": 64}),
        ("gemma2", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}),  # as published
        ("gemma2", {"final_logit_softcapping": None}),
    ],
)
def test_harmless_settings_are_accepted(make_config, family, changes):
    read_config(make_config(family, **changes))


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"model_type": "gpt2", "architectures": ["Gemma2ForCausalLM"]}, "model_type = 'gpt2'"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("llama", {"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"head_dim": 7}, "head_dim = 7"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ("llama", {"hidden_size": "48"}, "hidden_size"),
        ("llama", {"vocab_size": None}, "vocab_size is missing"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("llama", {"torch_dtype": "int8"}, "dtype = 'int8'"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers = '1'"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers = None"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window = 1"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),  # with no window given
        ("llama", {"hidden_size": 2**31}, "hidden_size = 2147483648"),
        ("llama", {"head_dim": 2**20}, "head_dim = 1048576"),
        ("llama", {"max_position_embeddings": None}, "max_position_embeddings is missing or null"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ("llama", {"rope_theta": 10**30}, "RoPE frequencies"),
        ("llama", {"rope_theta": 5e-324}, "RoPE frequencies"),
        ("llama", {"rope_theta": 1e300}, "RoPE frequencies"),
        ("llama", {"rope_theta": 10**400}, "rope_theta"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 5e-324}}, "RoPE frequencies"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1e308}}, "RoPE frequencies"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 5e-324}}, "RoPE frequencies"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1}, "RoPE frequencies"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 10**400}}, "attention_factor"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("llama", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "'ntk'"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "short_factor is missing"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": 1, "long_factor": 1}},
            "short_factor = 1 must be a list",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1, "x", 1], "long_factor": []}},
            "short_factor = 'x'",
        ),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1] * 4, "long_factor": []}}, "RoPE frequencies"),
        ("phi3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported: it must give an even"),
        ("phi3", {"partial_rotary_factor": 2}, "partial_rotary_factor = 2"),
        ("phi3", {"partial_rotary_factor": [1]}, "partial_rotary_factor = [1]"),
        ("phi3", {"partial_rotary_factor": 1e308}, "partial_rotary_factor = 1e+308"),
        ("phi3", {"attention_bias": True}, "attention_bias"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ("gemma3_text", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"attn_logit_softcapping": -1}, "attn_logit_softcapping = -1"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types names 3 layers"),
        ("gemma2", {"layer_types": ["full_attention", "chunked"]}, "layer_types"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers names 1 layers"),
        ("granite", {"residual_multiplier": "1"}, "residual_multiplier = '1'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": None}}, "factor is null"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor = '2'"),
        ("llama", {"rope_scaling": {"type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}, "low_freq_factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "phase": 1}}, "phase"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one flat set"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}},
            "disagree",
        ),
        ("llama", {"rope_theta": -1.0}, "rope_theta"),
        ("llama", {"model_type": ["llama"]}, "model_type = ['llama']"),
        ("llama", {"architectures": 7}, "architectures = 7"),
        ("llama", {"layer_types": 7}, "layer_types = 7"),
        ("llama", {"torch_dtype": ["float32"]}, "dtype = ['float32']"),
        ("llama", {"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "rope_type = ['linear']"),
        ("mistral", {"sliding_window": "4k"}, "sliding_window = '4k'"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(make_config, family, changes, named):
    with pytest.raises(UserError) as caught:
        read_config(make_config(family, **changes))
    assert named in str(caught.value) and "\n" not in str(caught.value)


WINDOWS = [
    ("mistral", {"sliding_window": 64}, 64),
    ("mistral", {"sliding_window": 128}, None),  # as long as the model
    ("mistral", {"max_position_embeddings": 32768, "sliding_window": "absent"}, 4096),  # transformers' default
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, 16),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, None),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 2}, None),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"] * 2}, 16),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": None}, None),
    ("qwen2", {"max_window_layers": "many"}, None),  # not read where nothing slides
]


@pytest.mark.parametrize(("family", "changes", "window"), WINDOWS)
def test_the_window_is_known_and_only_where_a_layer_has_one(make_config, family, changes, window):
    config = {k: v for k, v in make_config(family, **changes).items() if v != "absent"}
    assert read_config(config).sliding_window == window
    if config.get("max_window_layers", 0) in (0, 1, 2) and "layer_types" not in changes:
        theirs = AutoConfig.for_model(**config)  # which layers slide in transformers
        types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 2
        slides = getattr(theirs, "sliding_window", None) is not None and "sliding_attention" in types
        assert slides == (window is not None or config.get("sliding_window") == 128)


BAD_FILES = [None, "{", "[]", "\xff", f'{{"a": {"9" * 5000}}}', '{"a": ' * 5000, f'{{"a": {"[" * 100 + "]" * 100}}}']


@pytest.mark.parametrize("content", BAD_FILES, ids=range(len(BAD_FILES)))
def test_unreadable_files_are_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="config.json") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_importing_the_room_loads_neither_transformers_nor_megatron():
    rooms = ["hf_config", "rope", "names", "layout", "shards", "shard_writer", "hf_io"]
    code = "import sys\n" + "".join(f"import fuserl_megatron.convert.{room}\n" for room in rooms)
    code += "print([m for m in ('transformers', 'megatron', 'safetensors') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
