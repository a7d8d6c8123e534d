"""Every family through the model-parallel ranks: HF -> Megatron -> HF differs by exactly 0, per-token log-probabilities
within 1e-5 of transformers in fp32, and the same greedy text.

The default run takes a covering set: every case at least once, every layout with the cases it may break. The full
product of cases and layouts is marked slow.
"""

from pathlib import Path

import pytest
import torch
from family_models import MODELS, PLAIN
from plain_model import batch_of_rows, load_engine

from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}
CASES = {
    "llama2 MHA": dict(num_key_value_heads=8, rope_parameters=PLAIN),
    "llama3 GQA": dict(rope_parameters=PLAIN | {"rope_theta": 500000.0}),
    "llama3.1 llama3 rope": dict(vocab_size=157),
    "llama3.2 tied, wide heads": dict(tie_word_embeddings=True, head_dim=16, vocab_size=151),
    "MQA": dict(num_key_value_heads=1, rope_parameters=PLAIN),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "biases tied": dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, num_key_value_heads=2),
    "linear rope": dict(rope_parameters=PLAIN | {"rope_type": "linear", "factor": 3.0}),
    "dynamic rope": dict(rope_parameters=PLAIN | {"rope_type": "dynamic", "factor": 2.0}),
    "yarn rope": dict(rope_parameters=YARN),
    "yarn tied, attention factor": dict(tie_word_embeddings=True, rope_parameters=YARN | {"attention_factor": 1.3}),
    "mistral": dict(family="mistral", sliding_window=None, rope_parameters=PLAIN, head_dim=12, num_key_value_heads=2),
    "qwen2.5": dict(family="qwen2", rope_parameters=PLAIN | {"rope_theta": 1e6}),
    "qwen2.5 tied": dict(family="qwen2", rope_parameters=PLAIN, tie_word_embeddings=True, num_key_value_heads=2),
    "qwen3": dict(family="qwen3", rope_parameters=PLAIN | {"rope_theta": 1e6}, head_dim=16),
    "qwen3 tied": dict(family="qwen3", rope_parameters=YARN, tie_word_embeddings=True, num_key_value_heads=2),
    "mistral window": dict(family="mistral", sliding_window=5, rope_parameters=PLAIN),
    "qwen2.5 window": dict(
        family="qwen2", sliding_window=6, use_sliding_window=True, max_window_layers=2, rope_parameters=PLAIN
    ),
    "smollm3": MODELS["smollm3"] | dict(tie_word_embeddings=True),
    "granite 3": MODELS["granite"],
    "phi3": dict(family="phi3", sliding_window=7, rope_parameters=PLAIN),
    "phi4 partial rotary": MODELS["phi3"],
    "phi4 mini": dict(
        family="phi3",
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.5],
            "long_factor": [2.0, 7.0],
            "original_max_position_embeddings": 64,
        },
    ),
    "olmo2": MODELS["olmo2"],
    "gemma2": MODELS["gemma2"] | dict(tie_word_embeddings=True, sliding_window=6, scale=3.0),
    "gemma3": MODELS["gemma3"] | dict(tie_word_embeddings=True, sliding_window=6, scale=3.0),
}
LAYOUTS = {
    "tp1": (1, 1, None),
    "tp2": (2, 1, None),
    "pp2": (1, 2, None),
    "tp2 pp2": (2, 2, None),
    "pp2 vpp2": (1, 2, 2),
}
COVERING = [
    ("llama2 MHA", "tp2"), ("llama3 GQA", "tp1"), ("llama3 GQA", "pp2 vpp2"), ("llama3.1 llama3 rope", "tp2 pp2"),
    ("llama3.2 tied, wide heads", "pp2"), ("llama3.2 tied, wide heads", "tp2 pp2"), ("MQA", "pp2"),
    ("biases", "tp2 pp2"), ("biases tied", "pp2 vpp2"), ("linear rope", "tp2"), ("dynamic rope", "tp1"),
    ("yarn rope", "tp2"), ("yarn tied, attention factor", "pp2"), ("mistral", "tp2 pp2"), ("qwen2.5", "tp2"),
    ("qwen2.5 tied", "tp2 pp2"), ("qwen3", "tp2 pp2"), ("qwen3 tied", "pp2 vpp2"), ("mistral window", "tp1"),
    ("qwen2.5 window", "pp2"), ("smollm3", "pp2 vpp2"), ("granite 3", "tp2 pp2"), ("phi3", "tp2"),
    ("phi4 partial rotary", "tp2 pp2"), ("phi4 mini", "tp1"), ("olmo2", "tp2 pp2"), ("gemma2", "tp2 pp2"),
    ("gemma3", "tp2 pp2"),
]  # fmt: skip
PROMPT, NEW, ROWS = 12, 20, 2


def possible(case, layout):
    return CASES[case].get("num_key_value_heads", 4) % LAYOUTS[layout][0] == 0


REST = [(c, l) for c in CASES for l in LAYOUTS if possible(c, l) and (c, l) not in COVERING]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """case -> (directory, rows: prompt + transformers' greedy text, log-probabilities of all tokens but the first)."""
    from fuserl_megatron.proofs.verify_sides import HuggingFaceSide

    made = {}

    def make(case):
        if case not in made:
            directory = tmp_path_factory.mktemp("model")
            save_tiny_model(directory, seed=len(made), **CASES[case])
            save_char_tokenizer(directory)
            side = HuggingFaceSide(directory)
            side.load()
            prompts = torch.randint(0, 150, (ROWS, PROMPT), generator=torch.Generator().manual_seed(7)).tolist()
            rows = [p + new for p, new in zip(prompts, side.greedy(prompts, NEW), strict=True)]
            made[case] = (str(directory), rows, torch.stack([side.token_logps(row) for row in rows]))
        return made[case]

    return make


def through_megatron(source, destination, tp, pp, vpp, rows):
    """Load, run, export. On the last stage: log-probabilities [B, S] and the most probable tokens; None elsewhere."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps

    from fuserl_megatron.mcore import step, weights

    engine = load_engine(source, tp, pp, vpp)
    target = engine.target
    batch, found = batch_of_rows(torch.tensor(rows)), []

    def on_output(hidden_BSH, batch):
        logps = step._hidden_to_token_logps(engine, hidden_BSH, batch).view(ROWS, -1)
        logits = (hidden_BSH @ target.output_weight().t()).contiguous()
        parts = [torch.empty_like(logits) for _ in range(tp)]
        dist.all_gather(parts, logits, group=ps.get_tensor_model_parallel_group())
        found.append((logps, torch.cat(parts, dim=-1)[..., : target.shape.vocab_size].argmax(-1)))
        return hidden_BSH.sum() * 0, torch.zeros((), dtype=torch.int), None

    with torch.no_grad():
        step._run_schedule(engine, [batch] * (pp if vpp else 1), on_output, forward_only=True)
    weights.export_hf(target, engine.layout, destination, source_dir=source, lineage={"target": source})
    return found[0] if found else None


def check(ranks, reference, destination, case, layout):
    from safetensors.torch import load_file

    source, rows, expected = reference(case)
    tp, pp, vpp = LAYOUTS[layout]
    results = ranks.run(through_megatron, tp * pp, source, str(destination), tp, pp, vpp, rows)
    results = [r for r in results if r is not None]
    assert len(results) == tp
    for logps, choices in results:
        assert (logps - expected).abs().max() <= 1e-5
        # each next token is the most probable one after what transformers wrote so far: by induction the same text
        assert torch.equal(choices[:, PROMPT - 1 :], torch.tensor(rows)[:, PROMPT:])
    assert expected.std() > 0.5  # far from uniform
    before, after = (load_file(Path(d) / "model.safetensors") for d in (source, destination))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("case,layout", COVERING)
def test_family(ranks, reference, tmp_path, case, layout):
    check(ranks, reference, tmp_path / "back", case, layout)


@pytest.mark.slow
@pytest.mark.parametrize("case,layout", REST)
def test_family_full_product(ranks, reference, tmp_path, case, layout):
    check(ranks, reference, tmp_path / "back", case, layout)


def test_the_covering_set_covers():
    assert {case for case, _ in COVERING} == set(CASES)
    assert {layout for _, layout in COVERING} == set(LAYOUTS)
    assert all(possible(*pair) for pair in COVERING)


@pytest.mark.parametrize("fields", [dict(attention_bias=True), dict(mlp_bias=True)])
def test_one_bias_without_the_other_is_refused_by_name(ranks, tmp_path, fields):
    save_tiny_model(tmp_path / "model", **fields)
    with pytest.raises(RuntimeError, match="attention_bias=.* with mlp_bias="):
        ranks.run(through_megatron, 1, str(tmp_path / "model"), str(tmp_path / "back"), 1, 1, None, [[1, 2, 3]])
