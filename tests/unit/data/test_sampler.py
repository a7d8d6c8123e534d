"""Steps, micro-batches and their tensors: every prompt once, the same on any number of ranks, sequences intact."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuserl_megatron.config.schema import DataConfig, PackingConfig
from fuserl_megatron.data.batch import IGNORE_INDEX
from fuserl_megatron.data.reference import ReferenceCache
from fuserl_megatron.data.sampler import GlobalBatchSampler
from fuserl_megatron.util.errors import UserError

NUM_PROMPTS = 23


@pytest.fixture
def data(build_dataset, make_record):
    rng = np.random.default_rng(3)
    records = []
    for p in range(NUM_PROMPTS):
        prompt = " ".join(f"w{i}" for i in [p, *rng.integers(0, 100, rng.integers(0, 9))])
        for source in "abc":
            for n in range(3):
                words = [f"w{n}", *(f"w{i}" for i in rng.integers(0, 100, rng.integers(0, 9)))]
                records.append(
                    make_record(prompt=prompt, source=source, response=" ".join(words), reward=float(rng.normal()))
                )
    return build_dataset(records)


def config(seq_length=64, micro_batch_size=2, global_batch_size=5, shuffle=True, enabled=True, share_prefix="off"):
    return DataConfig(
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        shuffle=shuffle,
        packing=PackingConfig(enabled=enabled, share_prefix=share_prefix),
    )


LAYOUTS = [
    pytest.param({"share_prefix": "off"}, id="packed"),
    pytest.param({"share_prefix": "on"}, id="shared"),
    pytest.param({"enabled": False, "share_prefix": "off"}, id="row-each"),
]


def all_batches(sampler, plan):
    return [b for rank in range(sampler.dp_size) for b in sampler.micro_batches(plan, rank)]


def read_sequence(batch, n):
    """(prompt tokens, response tokens) of sequence n, read through labels, positions, segments and parents alone."""
    row, columns = (a.tolist() for a in (batch.sequence_ids_BS == n).nonzero(as_tuple=True))
    row = row[0]
    segment, parent = int(batch.segment_ids_BS[row, columns[0]]), int(batch.parent_ids_BS[row, columns[0]])
    assert columns == list(range(columns[0], columns[0] + len(columns)))
    visible = [
        s
        for s in range(columns[-1] + 1)
        if int(batch.segment_ids_BS[row, s]) in (segment, parent) and (s <= columns[-1])
    ]
    assert batch.positions_BS[row, visible].tolist() == list(range(len(visible)))  # an unbroken run of positions
    inputs = batch.tokens_BS[row, visible].tolist()
    response = batch.labels_BS[row, columns].tolist()
    num_prompt = len(inputs) - len(response) + 1
    assert inputs[num_prompt:] == response[:-1]  # every label is the next input
    return inputs[:num_prompt], response


def check_all_sequences(sampler):
    """One epoch holds exactly the prepared sequences, weights and pairs, and every token is that of the data set."""
    data, prepared = sampler.prepared.dataset, sampler.prepared
    owner = np.repeat(np.arange(data.num_groups), np.diff(data.response_offsets))
    seen, weights, pairs = [], {}, {}
    for step in range(sampler.steps_per_epoch):
        plan = sampler.step(step)
        for batch in all_batches(sampler, plan):
            assert batch.tokens_BS.shape == (sampler.data.micro_batch_size, sampler.data.seq_length)
            scored = batch.labels_BS != IGNORE_INDEX
            assert torch.equal(scored, batch.sequence_ids_BS >= 0)
            padding = batch.segment_ids_BS < 0
            assert torch.equal(padding, batch.parent_ids_BS < 0) and not scored[padding].any()
            assert not batch.tokens_BS[padding].any() and not batch.positions_BS[padding].any()
            for n in range(batch.num_sequences):
                i, g = int(batch.response_ids_N[n]), int(batch.prompt_ids_N[n])
                prompt, response = read_sequence(batch, n)
                assert owner[i] == g and prompt == data.prompt(g).tolist() and response == data.response(g, i).tolist()
                assert int(batch.lengths_N[n]) == len(response)
                assert int(batch.source_ids_N[n]) == data.source_ids[i]
                weights[i] = float(batch.weights_N[n])
                seen.append(i)
            for p in range(batch.chosen_index_P.numel()):
                ends = [int(batch.response_ids_N[index[p]]) for index in (batch.chosen_index_P, batch.rejected_index_P)]
                pairs[tuple(ends)] = (float(batch.pair_weights_P[p]), int(batch.pair_source_ids_P[p]))
    assert sorted(seen) == sorted(prepared.response_ids.tolist())
    assert weights == dict(zip(prepared.response_ids.tolist(), prepared.weights.tolist(), strict=True))
    expected = {}
    for g in range(prepared.num_prompts):
        first = prepared.sequence_offsets[g]
        for p in range(prepared.pair_offsets[g], prepared.pair_offsets[g + 1]):
            ends = (
                prepared.response_ids[first + prepared.chosen[p]],
                prepared.response_ids[first + prepared.rejected[p]],
            )
            expected[int(ends[0]), int(ends[1])] = (prepared.pair_weights[p], prepared.pair_source_ids[p])
    assert pairs == expected and bool(pairs) == (prepared.unit is not None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", ["fusesft", "fusepo"])
def test_batches_hold_the_sequences_of_the_data_set(data, prepare_stage, stage, layout):
    check_all_sequences(GlobalBatchSampler(prepare_stage(data, stage), config(**layout), seed=1, dp_size=2))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 9), min_size=2, max_size=4)), min_size=1, max_size=12
    ),
    st.sampled_from([layout.values[0] for layout in LAYOUTS]),
    st.sampled_from(["fusesft", "fusepo"]),
)
def test_any_lengths_give_back_their_sequences(build_dataset, make_record, prepare_stage, groups, layout, stage):
    records = [
        make_record(
            prompt=f"w{g} " + "w20 " * (size - 1), source="ab"[n // 2], response=f"w{n} " + "w5 " * length, reward=n
        )
        for g, (size, lengths) in enumerate(groups)
        for n, length in enumerate(lengths)
    ]
    prepared = prepare_stage(build_dataset(records, force=True), stage)
    check_all_sequences(GlobalBatchSampler(prepared, config(global_batch_size=4, **layout), seed=2, dp_size=2))


def test_the_reader_of_this_test_notices_damage(data, prepare_stage):
    """Negative control: a response that looks at the wrong prefix, or a shifted label, is no longer its sequence."""
    sampler = GlobalBatchSampler(prepare_stage(data), config(share_prefix="on", seq_length=200), seed=1, dp_size=1)
    (batch, *_) = sampler.micro_batches(sampler.step(0), 0)
    last = batch.num_sequences - 1
    read_sequence(batch, last)
    row, columns = (batch.sequence_ids_BS == last).nonzero(as_tuple=True)
    batch.parent_ids_BS[row, columns] = 0
    with pytest.raises(AssertionError):
        read_sequence(batch, last)
    batch.labels_BS[:] = batch.tokens_BS
    with pytest.raises(AssertionError):
        read_sequence(batch, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_order_and_content_do_not_depend_on_the_number_of_ranks(data, prepare_stage, layout):
    prepared = prepare_stage(data, "fusepo")
    samplers = [GlobalBatchSampler(prepared, config(**layout), seed=7, dp_size=dp) for dp in (1, 2, 4)]
    for step in range(2 * samplers[0].steps_per_epoch):
        plans = [s.step(step) for s in samplers]
        contents = []
        for sampler, plan in zip(samplers, plans, strict=True):
            np.testing.assert_array_equal(plan.prompts, plans[0].prompts)
            per_rank = [sampler.micro_batches(plan, r) for r in range(sampler.dp_size)]
            assert {len(batches) for batches in per_rank} == {plan.num_microbatches}
            contents.append(
                {tuple(b.response_ids_N.tolist()) for batches in per_rank for b in batches if b.num_sequences}
            )
        assert contents[0] == contents[1] == contents[2]
        assert {p.num_prompts for p in plans} == {plans[0].num_prompts}
        assert len({(p.real_tokens, p.scored_tokens, p.sum_weighted_tokens) for p in plans}) == 1


def test_each_epoch_takes_every_prompt_once_in_its_own_order(data, prepare_stage):
    sampler = GlobalBatchSampler(prepare_stage(data), config(), seed=7, dp_size=2)
    assert sampler.steps_per_epoch == 5
    epochs = [[sampler.step(5 * e + i) for i in range(5)] for e in range(3)]
    orders = [np.concatenate([p.prompts for p in plans]).tolist() for plans in epochs]
    assert all(sorted(order) == list(range(NUM_PROMPTS)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and orders[0] != list(range(NUM_PROMPTS))
    assert [p.num_prompts for p in epochs[0]] == [5, 5, 5, 5, 3]  # the last batch is what is left
    assert [p.epoch for p in epochs[2]] == [2] * 5
    again = GlobalBatchSampler(prepare_stage(data), config(), seed=7, dp_size=1)
    assert again.step(7).prompts.tolist() == epochs[1][2].prompts.tolist()  # asked for out of order
    assert (
        GlobalBatchSampler(prepare_stage(data), config(), seed=8, dp_size=1).step(0).prompts.tolist() != orders[0][:5]
    )
    plain = GlobalBatchSampler(prepare_stage(data), config(shuffle=False), seed=7, dp_size=1)
    assert plain.step(6).prompts.tolist() == [5, 6, 7, 8, 9]


def test_plan_figures_and_padding_batches(data, prepare_stage):
    prepared = prepare_stage(data)
    sampler = GlobalBatchSampler(prepared, config(), seed=7, dp_size=2, microbatch_multiple=4)
    plan = sampler.step(4)
    batches = all_batches(sampler, plan)
    assert plan.num_microbatches == 4 and len(batches) == 8
    empty = [b for b in batches if b.num_sequences == 0]
    assert empty and all((b.segment_ids_BS == -1).all() and b.chosen_index_P.numel() == 0 for b in empty)
    real = sum(int((b.segment_ids_BS >= 0).sum()) for b in batches)
    assert plan.real_tokens == real and plan.padding_share == pytest.approx(1 - real / (8 * 2 * 64))
    assert plan.scored_tokens == sum(int((b.labels_BS != IGNORE_INDEX).sum()) for b in batches)
    weighted = sum(float((b.weights_N * b.lengths_N).sum()) for b in batches)
    assert plan.sum_weighted_tokens == pytest.approx(weighted, rel=1e-12)
    assert plan.num_sequences == sum(b.num_sequences for b in batches) and plan.num_prompts == 3
    present = {f.name: getattr(batches[0], f.name) for f in fields(batches[0])}
    kinds = {name: tensor.dtype for name, tensor in present.items() if tensor is not None}
    assert {n for n, t in kinds.items() if t == torch.float64} == {"weights_N", "pair_weights_P"}
    assert {t for n, t in kinds.items() if "weights" not in n} == {torch.int64}
    assert {n: getattr(empty[0], n).dtype for n in kinds} == kinds


def test_whole_groups_share_a_micro_batch_when_packing_is_on(data, prepare_stage):
    for share in ("on", "off"):
        sampler = GlobalBatchSampler(prepare_stage(data), config(share_prefix=share), seed=1, dp_size=1)
        for batch_of in (sampler.micro_batches(sampler.step(i), 0) for i in range(5)):
            prompts = [set(b.prompt_ids_N.tolist()) for b in batch_of]
            assert sum(map(len, prompts)) == len(set().union(*prompts))
            if share == "on":
                for b in batch_of:
                    for g in b.prompt_ids_N.unique():
                        rows = {
                            int((b.sequence_ids_BS == n).nonzero()[0, 0]) for n in (b.prompt_ids_N == g).nonzero()[:, 0]
                        }
                        assert len(rows) == 1


def test_packing_off_gives_a_row_to_every_sequence(data, prepare_stage):
    sampler = GlobalBatchSampler(
        prepare_stage(data, "fusepo"), config(enabled=False, share_prefix="auto"), 1, dp_size=1
    )
    assert not sampler.share_prefix and sampler.sharing_reason == "auto: packing is off"
    for batch in sampler.micro_batches(sampler.step(0), 0):
        assert set(batch.segment_ids_BS.unique().tolist()) <= {-1, 0} and batch.chosen_index_P.numel() == 1


def test_scoring_covers_everything_once_and_skips_what_is_there(data, prepare_stage, tmp_path):
    prepared = prepare_stage(data, "fusepo")
    sampler = GlobalBatchSampler(prepared, config(), seed=1, dp_size=2)
    plans = list(sampler.scoring_plans())
    assert np.concatenate([p.prompts for p in plans]).tolist() == list(range(prepared.num_prompts))
    cache = ReferenceCache.open_or_create(tmp_path / "cache", "key", data.num_responses)
    for plan in plans[:2]:
        for batch in all_batches(sampler, plan):
            cache.write(batch.response_ids_N, -batch.response_ids_N.float())
    cache.write(prepared.response_ids[prepared.sequence_offsets[10] : prepared.sequence_offsets[11]][:1], [-1.0])
    rest = list(sampler.scoring_plans(cache.missing_mask))
    assert np.concatenate([p.prompts for p in rest]).tolist() == list(range(10, NUM_PROMPTS))
    (batch, *_) = sampler.micro_batches(plans[0], 0)
    assert torch.equal(cache.lookup(batch.response_ids_N), -batch.response_ids_N.float())
    with pytest.raises(UserError, match="has no reference log-probability: run the scoring pass again"):
        cache.lookup(sampler.micro_batches(plans[3], 0)[0].response_ids_N)


def test_sharing_is_decided_from_the_measured_lengths(build_dataset, make_record, prepare_stage):
    records = [make_record(prompt="w1 " * 20 + f"w{p}", source=s, response=f"w{p}") for p in range(4) for s in "abcd"]
    prepared = prepare_stage(build_dataset(records))
    shared = GlobalBatchSampler(prepared, config(share_prefix="auto"), 1, 1)
    separate, together = 4 * (20 + 2), 20 + 4 * 2
    assert shared.share_prefix and shared.sharing_reason.startswith(f"auto: saves {1 - together / separate:.1%}")
    short_rows = GlobalBatchSampler(prepared, config(share_prefix="auto", seq_length=24, micro_batch_size=4), 1, 1)
    assert (
        not short_rows.share_prefix
        and "longest group would need 28 positions, a row has 24" in short_rows.sharing_reason
    )
    assert not GlobalBatchSampler(prepared, config(share_prefix="off"), 1, 1).share_prefix
    one_token_prompts = [make_record(prompt=f"w{p}", source=s, response="w5 w6 w7") for p in range(4) for s in "ab"]
    prepared = prepare_stage(build_dataset(one_token_prompts, force=True))
    sampler = GlobalBatchSampler(prepared, config(share_prefix="auto"), 1, 1)
    assert not sampler.share_prefix and "would save only 0.0%" in sampler.sharing_reason
    forced = GlobalBatchSampler(
        prepared, config(share_prefix="on"), 1, 1
    )  # a prompt of one token has no prefix to share
    (batch,) = forced.micro_batches(forced.step(0), 0)
    assert torch.equal(batch.segment_ids_BS, batch.parent_ids_BS)
    assert read_sequence(batch, 1) == ([2], [7, 8, 9, 1])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"seq_length": 20}, "prompt 0 needs 24 positions in one row of 20: set data.seq_length to at least 24"),
        ({"seq_length": 30, "micro_batch_size": 1}, "2 sequences \\(a pair\\), 48 positions, do not fit the 1 x 30"),
        ({"seq_length": 26, "share_prefix": "on"}, "prompt 0 needs 36 positions .*data.packing.share_prefix=off"),
        (
            {"enabled": False, "micro_batch_size": 1},
            "2 sequences \\(a pair\\) need a row each in one micro-batch of 1 rows: set .* at least 2",
        ),
        ({"enabled": False, "share_prefix": "on"}, "share_prefix=on needs data.packing.enabled=true"),
        ({"global_batch_size": 0}, "data.global_batch_size=0: it must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_size(build_dataset, make_record, prepare_stage, values, says):
    records = [
        make_record(prompt="w1 " * 20 + "w1", source=s, response=f"w1 w2 w{n}", reward=n)
        for s in "ab"
        for n in range(2)
    ]
    prepared = prepare_stage(build_dataset(records), "fusepo")
    with pytest.raises(UserError, match=says) as error:
        GlobalBatchSampler(prepared, config(**values), 1, 1)
    assert "\n" not in str(error.value)
    fits = config(seq_length=48, micro_batch_size=2)
    assert GlobalBatchSampler(prepared, fits, 1, 1).step(0).num_microbatches == 1
