"""The flags for Megatron-LM: what each family needs of them, and what none can say."""

import shlex

import pytest
import torch

from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.convert.megatron_lm import flags_text, megatron_lm_flags
from fuserl_megatron.convert.offline import hf_to_megatron

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 = LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}


def flags(make_config, family="llama", dtype=torch.float32, **changes):
    words, problems = megatron_lm_flags(read_config(make_config(family, **changes)), dtype, "/c k")
    assert words[:5] == ["--load", "/c k", "--use-checkpoint-args", "--no-load-optim", "--no-load-rng"]
    assert words[5:9] == ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "/c k/hf"]
    return " ".join(words[9:]), problems


def test_what_the_checkpoint_s_own_arguments_do_not_say(make_config):
    assert flags(make_config, "mistral") == ("--norm-epsilon 1e-05", [])
    assert flags(make_config, "qwen2", rms_norm_eps=1e-6) == ("--norm-epsilon 1e-06", [])
    assert flags(make_config, "qwen3", dtype=torch.bfloat16) == ("--norm-epsilon 1e-05 --qk-layernorm --bf16", [])
    scaling = "--norm-epsilon 1e-05 --fp16 --use-rope-scaling --rope-scaling-factor 8.0"
    assert flags(make_config, dtype=torch.float16, rope_parameters=LLAMA31) == (scaling, [])
    linear = {"type": "linear", "factor": 4.0}
    assert flags(make_config, rope_scaling=linear) == (
        "--norm-epsilon 1e-05 --rotary-seq-len-interpolation-factor 4",
        [],
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(rope_parameters=LLAMA31 | {"factor": 32.0}), "factor 32 instead of 8"),
        (dict(rope_parameters=LLAMA31 | {"low_freq_factor": 2.0}), "low_freq_factor 2 instead of 1"),
        (dict(rope_parameters=LLAMA3), "original_max_position_embeddings 128 instead of 8192"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "no RoPE scaling of type yarn"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 2.5}), "no RoPE scaling of type linear"),
        (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "not stretched beyond 128 tokens"),
        (dict(family="mistral", sliding_window=64), "a window of 64 tokens"),
    ],
)
def test_what_cannot_be_said_is_said(make_config, changes, said):
    _, problems = flags(make_config, **changes)
    assert len(problems) == 1 and said in problems[0]
    text = flags_text(read_config(make_config(**changes)), torch.float32, "c")
    assert text.startswith("# Megatron-LM computes the same model with these flags, but for what follows:\n#   ")


def test_the_file_lies_beside_the_checkpoint(make_config, write_model, tmp_path):
    write_model(tmp_path / "hf", make_config("qwen3", rms_norm_eps=1e-6))
    checkpoint = hf_to_megatron(tmp_path / "hf", tmp_path / "it's")
    comment, line = (checkpoint / "megatron_lm_flags.txt").read_text().splitlines()
    assert comment == "# Megatron-LM computes the same model with these flags:"
    assert shlex.split(line) == megatron_lm_flags(read_config(tmp_path / "hf"), torch.float32, checkpoint)[0]
