"""Plans: memory against the arithmetic in the presets, time against the published rows, what to type."""

import json
import sys
from pathlib import Path

import pytest

from fuserl_megatron.cli import main
from fuserl_megatron.config.load import load_config
from fuserl_megatron.plan.cards import CARDS
from fuserl_megatron.plan.layouts import layouts, overrides, plans
from fuserl_megatron.plan.memory import Keeping, memory_bytes
from fuserl_megatron.plan.step_time import FITTED, Layout, Matrices, Work, step_seconds

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
EIGHT_B = Matrices(32, 4096, 14336, 32, 8)
SEVENTY_B = Matrices(80, 8192, 28672, 64, 8)


def config_json(directory, model):
    directory.mkdir()
    values = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=model.vocabulary)
    values |= dict(hidden_size=model.hidden, intermediate_size=model.channels, num_hidden_layers=model.layers)
    values |= dict(num_attention_heads=model.heads, num_key_value_heads=model.groups, hidden_act="silu")
    values |= dict(rms_norm_eps=1e-5, rope_theta=5e5, max_position_embeddings=8192, tie_word_embeddings=False)
    (directory / "config.json").write_text(json.dumps(values))


def test_memory_is_that_of_the_preset():
    """conf/preset/llama31_8b_8gpu.yaml: 36 GB of states, 9 GB of activations."""
    parts = memory_bytes(EIGHT_B, Layout(8, tp=2), Keeping(4096))
    states = parts["weights"] + parts["gradients"] + parts["states"]
    assert states == pytest.approx(8.03e9 / 2 * 6 + 8.03e9 / 8 * 12, rel=0.001)
    assert parts["activations"] == pytest.approx(32 * 4096 * 2 * (6.5 * 4096 + 3 * 14336) / 2, rel=1e-9)


def test_an_adapter_alone_has_gradients_and_states():
    """conf/preset/llama31_70b_lora_8gpu.yaml: 207e6 numbers, 107e6 a rank; distributed/test_lora.py counts a run's."""
    layer = (16 * (8192 + 2 * 1024 + 8192 + 3 * 28672), 16 * (6 * 8192 + 8192))
    full = memory_bytes(SEVENTY_B, Layout(8, tp=4), Keeping(4096))
    parts = memory_bytes(SEVENTY_B, Layout(8, tp=4), Keeping(4096, adapter=layer))
    assert 80 * sum(layer) == 207_093_760
    own = 80 * (layer[0] / 4 + layer[1])
    assert (parts["gradients"], parts["states"]) == (4 * own, 12 * own / 2)
    assert parts["weights"] - full["weights"] == pytest.approx(2 * own)


def test_memory_falls_with_what_divides_it():
    base = memory_bytes(EIGHT_B, Layout(8), Keeping(4096))
    for layout, falls in (
        (Layout(8, tp=2), ("weights", "gradients", "activations", "logits")),
        (Layout(16), ("states",)),
        (Layout(8, cp=2), ("activations",)),
        (Layout(8, pp=2), ("weights", "gradients")),
        (Layout(8, recompute="full"), ("activations",)),
    ):
        parts = memory_bytes(EIGHT_B, layout, Keeping(4096))
        assert all(parts[name] < base[name] for name in falls), layout


def test_the_fit_is_the_one_to_the_published_rows():
    import cost_model

    assert cost_model.fit_to(cost_model.ROWS) == FITTED


def test_recomputing_costs_less_than_a_forward_pass_more():
    work, card = Work(64, 4096), CARDS["H100"]
    plain, full = (
        sum(step_seconds(EIGHT_B, Layout(8, recompute=recompute), work, card).values())
        for recompute in ("none", "full")
    )
    assert 1.15 < full / plain < 4 / 3


def test_every_layout_is_one_that_training_takes():
    for layout in layouts(EIGHT_B, 16, CARDS["H100"], Work(64, 4096)):
        words = ["model.path=x", "data.path=x", *overrides(layout, "bf16")]
        config = load_config("train", words).model
        ranks = config.tensor_model_parallel_size * config.pipeline_model_parallel_size * config.context_parallel_size
        assert ranks * layout.dp == 16 and EIGHT_B.layers % (layout.pp * layout.vpp) == 0
        break


def test_of_alike_times_the_simpler_layout_comes_first():
    found, nothing = plans(EIGHT_B, 8, CARDS["H100"], Work(64, 4096), Keeping(4096))
    best = found[0]
    assert nothing is None and best.layout.pp == best.layout.cp == 1 and best.layout.recompute == "none"
    assert best.total_memory < 0.95 * 80e9 and best.step < 1.05 * min(plan.step for plan in found)


def test_what_does_not_fit_says_what_would(tmp_path, capsys):
    config_json(tmp_path / "70b", SEVENTY_B)
    words = ["--rows", "64", f"model.path={tmp_path}/70b", "data.seq_length=4096"]
    assert main(["plan", "--gpus", "8", *words]) == 2
    error = capsys.readouterr().err
    assert "no layout fits in 95% of one H100: the smallest needs" in error and "; --gpus 32 would." in error
    assert main(["plan", "--gpus", "32", "--json", str(tmp_path / "plans.json"), *words]) == 0
    out = capsys.readouterr().out
    assert "the first one:" in out and "optim=distributed" in out
    assert all(sum(p["memory"].values()) < 80e9 for p in json.loads((tmp_path / "plans.json").read_text()))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "0", "--rows", "1"], "--gpus 0: must be at least 1"),
        (
            ["--gpus", "8", "--rows", "1", "--card", "H10"],
            "--card H10: not one of A100, H100, H200, B200. Did you mean H100",
        ),
        (["--gpus", "8"], "data.path: required and not set"),
    ],
)
def test_mistakes(tmp_path, words, says, capsys):
    assert main(["plan", *words, f"model.path={tmp_path}"]) == 2
    assert says in capsys.readouterr().err
