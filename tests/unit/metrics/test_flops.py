"""The formula of a step's FLOPs against a plain model counted by torch, and what the meters say of speed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fuserl_megatron.config.load import load_config
from fuserl_megatron.config.schema import ExpManagerConfig
from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.data.packing import attended_keys, group_chunks
from fuserl_megatron.metrics import flops
from fuserl_megatron.runtime.profiling import StepProfiler

SHAPE = read_config(
    dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )
)


def counted_flops(prompt: int, responses: list[int], share_prefix: bool) -> int:
    """Forward and backward of a Llama's matrix products written out: every query asks its own keys and no others."""
    heads, groups, dim, hidden = SHAPE.num_attention_heads, SHAPE.num_query_groups, SHAPE.head_dim, SHAPE.hidden_size

    def matrix(rows, columns):
        return torch.ones(rows, columns, requires_grad=True)

    width, kv = heads * dim, groups * dim
    layers = [
        [matrix(hidden, width), matrix(hidden, kv), matrix(hidden, kv), matrix(width, hidden)]
        + [matrix(hidden, SHAPE.ffn_hidden_size), matrix(hidden, SHAPE.ffn_hidden_size)]
        + [matrix(SHAPE.ffn_hidden_size, hidden)]
        for _ in range(SHAPE.num_layers)
    ]
    head = matrix(hidden, SHAPE.vocab_size)
    segments = []  # (positions, positions of the prefix before them, whether its positions are scored from the back)
    if share_prefix:
        segments = [(prompt - 1, None, 0)] + [(r, 0, r) for r in responses]
    else:
        segments = [(prompt + r - 1, None, r) for r in responses]
    with FlopCounterMode(display=False) as counter:
        states = [torch.ones(n, hidden, requires_grad=True) for n, _, _ in segments]
        for wq, wk, wv, wo, gate, up, down in layers:
            keys, values = [x @ wk for x in states], [x @ wv for x in states]
            for i, (length, parent, _) in enumerate(segments):
                before = [] if parent is None else [parent]
                k = torch.cat([keys[j] for j in before] + [keys[i]]).view(-1, groups, dim)
                v = torch.cat([values[j] for j in before] + [values[i]]).view(-1, groups, dim)
                q = (states[i] @ wq).view(length, heads, dim)
                start, out = k.shape[0] - length, []
                for t in range(length):
                    seen_k, seen_v = (z[: start + t + 1].repeat_interleave(heads // groups, 1) for z in (k, v))
                    scores = torch.bmm(q[t][:, None], seen_k.permute(1, 2, 0))
                    out.append(torch.bmm(scores, seen_v.transpose(0, 1)).reshape(1, width))
                states[i] = states[i] + torch.cat(out) @ wo
                states[i] = states[i] + ((states[i] @ gate) * (states[i] @ up)) @ down
        # what is not scored still takes part in the backward pass through the keys that later positions see
        loss = sum((x[-scored:] @ head).sum() for x, (_, _, scored) in zip(states, segments, strict=True) if scored)
        (loss + 0 * sum(x.sum() for x in states)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize(("prompt", "responses"), [(5, [3]), (4, [2, 5, 1])])
def test_flops_are_those_of_a_plain_model(prompt, responses, share_prefix):
    tokens = sum(group_chunks(prompt, responses, share_prefix))
    keys = attended_keys(prompt, responses, share_prefix)
    expected = counted_flops(prompt, responses, share_prefix)
    assert flops.step_flops(SHAPE, tokens, keys, sum(responses)) == expected
    # negative controls: a dense square of attention, logits of every position
    assert flops.step_flops(SHAPE, tokens, tokens**2, sum(responses)) != expected
    assert flops.step_flops(SHAPE, tokens, keys, tokens) != expected


def test_attended_keys_are_those_of_the_mask():
    prompt, responses = 6, [3, 1, 4]
    segments = np.repeat([0, 1, 2, 3], [prompt - 1, *responses])
    parents = np.where(segments == 0, 0, 0)
    seen = np.tril((segments[:, None] == segments) | (parents[:, None] == segments))
    assert attended_keys(prompt, responses, True) == seen.sum()
    assert attended_keys(1, [2, 3], True) == attended_keys(1, [2, 3], False) == 3 + 6


def test_published_row():
    """Llama-3 8B at 8192 tokens: 14,451 tokens/s a GPU are published as 744 TFLOP/s (Megatron-Bridge, DGX-H100)."""
    shape = read_config(
        dict(SHAPE.raw, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
        | dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    )
    per_token = flops.step_flops(shape, 8192, 8192 * 8193 // 2, 8192) / 8192
    assert 14451 * per_token / 1e12 == pytest.approx(744, rel=2e-3)


@pytest.mark.parametrize(
    ("device", "number_format", "peak"),
    [
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "fp8_delayed", 1979.0),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA H100 PCIe", "bf16", None),
        ("NVIDIA H200 NVL", "bf16", None),
        ("NVIDIA GB200", "bf16", None),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
        (None, "32", None),
    ],
)
def test_peak_is_of_the_card_and_format_or_none(device, number_format, peak):
    assert flops.peak_tflops(device, number_format) == peak
    words = flops.describe_peak(device, number_format)
    assert ("no MFU" in words) == (peak is None) and (device or "CPU") in words


def test_rates_and_split():
    found = flops.rates(2.0, 4 * 10**15, 8, 6000, 4, 1000.0)
    assert found == dict(tokens_per_second=3000, groups_per_second=4, model_tflops_per_device=500, mfu=0.5)
    assert "mfu" not in flops.rates(2.0, 10**15, 8, 6000, 4, None)
    split = flops.time_split(2.0, dict(data=0.1, forward_backward=1.5, gradient_sync=0.25, optimizer=0.2))
    assert split["seconds_forward_backward"] == 1.25 and split["seconds_gradient_sync"] == 0.25
    assert sum(split.values()) == pytest.approx(2.0)


def test_profiler_traces_the_steps_asked_for_and_no_others(tmp_path, capsys):
    profiler = StepProfiler(ExpManagerConfig(profile_steps=(2, 3)), tmp_path, 0)
    for step in range(1, 6):
        with profiler.around(step):
            torch.ones(step, step + 1) @ torch.ones(step + 1, 3)
    profiler.close()
    events = json.loads((tmp_path / "profile" / "rank0.json").read_text())["traceEvents"]
    shapes = [e["args"]["Input Dims"][0] for e in events if e.get("name") == "aten::mm"]
    assert shapes == [[2, 3], [3, 4]]
    assert str(tmp_path / "profile") in capsys.readouterr().out
    StepProfiler(ExpManagerConfig(), tmp_path / "none", 0).close()
    assert not Path(tmp_path / "none").exists()


def test_profiler_settings_load():
    config = load_config("train", ["model.path=/m", "data.path=/d", "exp_manager.profile_steps=[10,12]"])
    assert config.exp_manager.profile_steps == (10, 12)


def test_frozen_matrices_have_no_gradient_of_their_own():
    all_weights, lora = (flops.step_flops(SHAPE, 10, 30, 4, adapter) for adapter in (0, 100))
    attention = 3 * 4 * 2 * 24 * 30  # 2 layers, 24 wide, 30 keys
    assert lora == (all_weights - attention) * 2 // 3 + attention + 6 * 100 * 10
