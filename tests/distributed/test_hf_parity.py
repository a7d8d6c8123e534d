"""Per-token log-probabilities of the Megatron model against transformers on the same weights (fp32, <= 1e-5)."""

import pytest
import torch

from fuserl_megatron.config.schema import ModelConfig, ObjectiveConfig, TrainerConfig
from fuserl_megatron.testing.tiny import save_tiny_model

ROWS, TOKENS = 2, 48
LAYOUTS = [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False), (2, 2, True)]


def make_batch(vocab_size):
    from fuserl_megatron.data.batch import PackedBatch

    g = torch.Generator().manual_seed(3)
    rows = torch.randint(0, vocab_size, (ROWS, TOKENS + 1), generator=g)
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    one = torch.ones(ROWS, dtype=torch.int64)
    return PackedBatch(
        tokens_BS=rows[:, :-1].contiguous(),
        labels_BS=rows[:, 1:].contiguous(),
        positions_BS=torch.arange(TOKENS).expand(ROWS, -1).contiguous(),
        segment_ids_BS=ids,
        parent_ids_BS=ids,
        sequence_ids_BS=torch.arange(ROWS)[:, None].expand(-1, TOKENS).contiguous(),
        lengths_N=one * TOKENS,
        weights_N=one.double(),
        source_ids_N=one * 0,
        prompt_ids_N=torch.arange(ROWS),
        response_ids_N=torch.arange(ROWS),
        chosen_index_P=one[:0],
        rejected_index_P=one[:0],
        pair_weights_P=one[:0].double(),
        pair_source_ids_P=one[:0],
    )


def token_logps(directory, tp, pp, sp, swap_qkv=False, divisible_by=128):
    """Token log-probabilities [B*S] on the last stage, None elsewhere."""
    from fuserl_megatron.convert.hf_config import read_config
    from fuserl_megatron.mcore import model as m
    from fuserl_megatron.mcore import parallel, step, weights

    model = ModelConfig(
        path=directory,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sp,
        make_vocab_size_divisible_by=divisible_by,
    )
    layout = parallel.initialize(model, TrainerConfig(precision="32"))
    target = m.build_model(read_config(directory), model, layout, torch.float32)
    weights.load_hf_weights(target, directory, layout)
    if swap_qkv:  # the negative control: heads of a group in plain q, k, v order
        for chunk in target.chunks:
            for layer in chunk.decoder.layers:
                w = layer.self_attention.linear_qkv.weight.data
                w.copy_(w.roll(target.shape.head_dim, 0))
    engine = step.Engine(
        target=target, layout=layout, objective=ObjectiveConfig(), source_names=["a"], logprob_chunk_size=37
    )
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
