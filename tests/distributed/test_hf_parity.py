"""Per-token log-probabilities of the Megatron model against transformers on the same weights (fp32, <= 1e-5)."""

import pytest
import torch
from plain_model import batch_of_rows, load_engine

from fuserl_megatron.testing.tiny import save_tiny_model

ROWS, TOKENS = 2, 48
LAYOUTS = [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False), (2, 2, True)]


def make_batch(vocab_size):
    return batch_of_rows(torch.randint(0, vocab_size, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(3)))


def token_logps(directory, tp, pp, sp, swap_qkv=False, divisible_by=128):
    """Token log-probabilities [B*S] on the last stage, None elsewhere."""
    from fuserl_megatron.mcore import step

    engine = load_engine(directory, tp, pp, sequence_parallel=sp, make_vocab_size_divisible_by=divisible_by)
    target = engine.target
    if swap_qkv:  # the negative control: heads of a group in plain q, k, v order
        for chunk in target.chunks:
            for layer in chunk.decoder.layers:
                w = layer.self_attention.linear_qkv.weight.data
                w.copy_(w.roll(target.shape.head_dim, 0))
    batch = make_batch(target.shape.vocab_size)
    found = []
    step._run_schedule(
        engine,
        [batch],
        lambda out, batch: (
            out.sum() * 0,
            torch.zeros((), dtype=torch.int),
            found.append(step._hidden_to_token_logps(engine, out, batch).detach()),
        ),
        forward_only=True,
    )
    return found[0] if found else None


def reference_logps(directory):
    from transformers import AutoModelForCausalLM

    batch = make_batch(AutoModelForCausalLM.from_pretrained(directory).config.vocab_size)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logps = model(input_ids=batch.tokens_BS, use_cache=False).logits.log_softmax(-1)
    return logps.gather(-1, batch.labels_BS[..., None])[..., 0].flatten()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("tiny"))
    save_tiny_model(directory, vocab_size=157)
    return directory, reference_logps(directory)


@pytest.mark.parametrize("tp,pp,sp", LAYOUTS)
def test_token_logps_equal_transformers(ranks, tiny, tp, pp, sp):
    directory, expected = tiny
    for actual in ranks.run(token_logps, tp * pp, directory, tp, pp, sp):
        if actual is not None:
            assert (actual - expected).abs().max() <= 1e-5
    assert expected.std() > 0.5  # the comparison is not between two uniform distributions


def test_negative_control_wrong_qkv_order_breaks_the_bound(ranks, tiny):
    directory, expected = tiny
    (actual,) = ranks.run(token_logps, 1, directory, 1, 1, False, True)
    assert (actual - expected).abs().max() > 1e-2
