"""Token by token: packing, shared prefixes and every layout give the log-probabilities and gradients of single rows.

The loss is a sum of all scored tokens' log-probabilities, each with a factor of its own, over their number: no mistake
can cancel inside a sequence. The expected values are transformers' in float64, one sequence at a time.

Shapes: T scored tokens.
"""

import functools
import math
from unittest import mock

import pytest
from fusion_case import make_case, make_config, worst_relative_error
from groups import read_group

from fuserl_megatron.data.batch import IGNORE_INDEX

BOUND = 1e-5
ALL_RESPONSES = dict(stage="fusepo", loss="rloo")


def factor(response_id, position):
    return math.sin(0.7 * response_id + 1.3 * position)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("case"), num_prompts=5, seed=3)


@pytest.fixture(scope="module")
def expected(case):
    return twin(case)


def twin(paths):
    """{(response, position): log-probability} and gradients by name, float64."""
    import torch
    from transformers import AutoModelForCausalLM

    from fuserl_megatron.data.dataset import FusedDataset

    model = AutoModelForCausalLM.from_pretrained(paths["policy"], dtype=torch.float64, attn_implementation="eager")
    data, values, loss = FusedDataset(paths["data"]), {}, 0.0
    for g in range(data.num_groups):
        group = read_group(data, g)
        prompt = group.prompt_tokens.tolist()
        for n, response in enumerate(group.responses, group.first_response_id):
            row = torch.tensor([prompt + response.tolist()])
            logps = model(input_ids=row, use_cache=False).logits[0].log_softmax(-1)
            for position, token in enumerate(response.tolist(), len(prompt) - 1):
                values[n, position] = logps[position, token].item()
                loss = loss + factor(n, position) * logps[position, token]
    (loss / len(values)).backward()
    return values, {name: p.grad for name, p in model.named_parameters()}


def packed(config, num_tokens, fault=None, band="cheapest"):
    """The same two, of this layout, on rank 0; with one planted mistake when asked."""
    import torch

    from fuserl_megatron.mcore import attention, parallel, step, weights
    from fuserl_megatron.runtime import collectives
    from fuserl_megatron.train.feed import make_engine, make_feed, open_run, with_optimizer

    config, shape, (data,) = open_run(config, [config.data.path])
    layout = parallel.initialize(config.model, config.trainer)
    feed, engine = make_feed(config, data, layout), make_engine(config, layout, shape, data.sources)
    weights.load_hf_weights(engine.target, config.model.path, layout)
    engine = with_optimizer(config, engine)

    def on_output(output, batch):
        logps_T = step._hidden_to_token_logps(engine, output, batch)
        scored_BS = batch.labels_BS != IGNORE_INDEX
        responses_T = batch.response_ids_N[batch.sequence_ids_BS[scored_BS]]
        if fault == "positions not continued":  # what is compared is the token's place, not the planted one
            keys = [(n, -1) for n in responses_T.tolist()]
        else:
            keys = list(zip(responses_T.tolist(), batch.positions_BS[scored_BS].tolist(), strict=True))
        factors_T = torch.tensor([factor(*key) for key in keys], dtype=torch.float64)
        divisor = num_tokens if fault != "local normaliser" else max(len(keys), 1) * layout.cp_size
        found = dict(zip(keys, logps_T.tolist(), strict=True))
        return (factors_T * logps_T).sum() / divisor, torch.zeros((), dtype=torch.int), found

    visible = step.Visibility

    def leaking(segments, parents, *rest):
        return visible(parents, parents, *rest)

    def restarted(plan, dp_rank):
        from dataclasses import replace

        batches = feed.sampler.micro_batches(plan, dp_rank)
        own = [b.segment_ids_BS == b.parent_ids_BS for b in batches]
        return [replace(b, positions_BS=b.positions_BS * o) for b, o in zip(batches, own, strict=True)]

    make = restarted if fault == "positions not continued" else feed.batches
    choose = attention.cheapest_band if band == "cheapest" else lambda *_: band
    with (
        mock.patch.object(attention, "cheapest_band", choose),
        mock.patch.object(step, "Visibility", leaking if fault == "sibling leak" else visible),
    ):
        for part in engine.wrapped:
            part.train()
            part.zero_grad_buffer()
        found = step._run_schedule(engine, make(feed.sampler.step(0), layout.dp_rank), on_output, forward_only=False)
    gathered = collectives.from_all_ranks(found if layout.tp_rank == 0 else [])
    values = {key: value for part in gathered for micro_batch in part for key, value in micro_batch.items()}
    grads = dict(weights.gather_hf_tensors(engine.target, layout, lambda p: p.main_grad.detach().clone()))
    return values, {name: grad.double() for name, grad in grads.items()}


LAYOUTS = {
    "one rank": (dict(), 1),
    "tp2": (dict(tp=2), 2),
    "tp2 sp, full recompute": (dict(tp=2, sp=True, recompute="full"), 2),
    "pp2, selective recompute": (dict(pp=2, recompute="selective"), 2),
    "cp2, full recompute": (dict(cp=2, recompute="full"), 2),
    "tp2 cp2 sp, selective recompute": (dict(tp=2, cp=2, sp=True, recompute="selective"), 4),
    "pp2 cp2": (dict(pp=2, cp=2), 4),
    "pp2 vpp2": (dict(pp=2, vpp=2), 2),
}


def config_of(case, changes):
    return make_config(case, ALL_RESPONSES, global_batch_size=5, seq_length=320, rows=1, **changes)


@pytest.mark.parametrize("share", ["off", "on"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_and_gradient(ranks, case, expected, layout, share):
    changes, world = LAYOUTS[layout]
    values, grads = ranks.run(packed, world, config_of(case, changes | {"share": share}), len(expected[0]))[0]
    assert values.keys() == expected[0].keys()
    assert max(abs(values[key] - expected[0][key]) for key in values) <= BOUND
    assert worst_relative_error(grads, expected[1]) <= BOUND


@pytest.mark.parametrize("band", [None, 32], ids=["by span", "by band"])
@pytest.mark.parametrize("share", ["off", "on"])
def test_rows_cut_for_attention_with_another_micro_batch_in_between(ranks, case, expected, share, band):
    """1F1B: the layers are recomputed when later micro-batches have been laid out."""
    config = config_of(case, dict(pp=2, recompute="full", share=share))
    values, grads = ranks.run(packed, 2, config, len(expected[0]), None, band)[0]
    assert max(abs(values[key] - expected[0][key]) for key in values) <= BOUND
    assert worst_relative_error(grads, expected[1]) <= BOUND


@pytest.mark.parametrize("fault", ["sibling leak", "positions not continued", "local normaliser"])
def test_planted_mistakes_break_the_bound(ranks, case, expected, fault):
    changes = dict(cp=2, share="on")
    values, grads = ranks.run(packed, 2, config_of(case, changes), len(expected[0]), fault)[0]
    assert worst_relative_error(grads, expected[1]) > 100 * BOUND
    if fault == "sibling leak":
        assert max(abs(values[key] - expected[0][key]) for key in values) > 100 * BOUND


def with_another_rule(rule, config):
    from fuserl_megatron.mcore import context, parallel

    with mock.patch.object(context._SumOverContext, "backward", staticmethod(rule)):
        parallel.initialize(config.model, config.trainer)


def times_ranks(ctx, grad):
    return 2 * grad, None


def test_a_wrong_gradient_rule_is_seen_before_a_step(ranks, case):
    with pytest.raises(RuntimeError, match="the sum over context ranks has gradient 12.0, not 6"):
        ranks.run(functools.partial(with_another_rule, times_ranks), 2, config_of(case, dict(cp=2)))
