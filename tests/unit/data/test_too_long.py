"""data.on_too_long: what does not fit is named with file and line, left out or cut, and counted."""

import dataclasses

import numpy as np
import pytest

from fuserl_megatron.config.schema import DataConfig, PackingConfig
from fuserl_megatron.data.packing import fits
from fuserl_megatron.data.prepared import mismatched
from fuserl_megatron.data.sampler import GlobalBatchSampler
from fuserl_megatron.data.too_long import _needed_length, fitted
from fuserl_megatron.train.checks import check_prepared
from fuserl_megatron.util.errors import UserError

LONG = {3: 60, 8: 40}
"""Prompt -> tokens of its longer responses; the others have 5."""
STAGES = {
    "sft": dict(stage="fusesft"),
    "dpo": dict(stage="fusepo", loss="dpo"),
    "rloo": dict(stage="fusepo", loss="rloo"),
    "kto": dict(stage="fusepo", loss="kto"),
    "wrpo": dict(stage="fusepo", loss="wrpo", target_source="a"),
}


@pytest.fixture
def dataset(build_dataset, make_record):
    """12 prompts x 2 sources x 2 responses; those of two prompts are long."""
    records = [
        make_record(prompt=f"w{p} w1", source=s, response=f"w{p} w{n} " + "w5 " * (LONG.get(p, 4) - 1 - n), reward=n)
        for p in range(12)
        for s in "ab"
        for n in range(2)
    ]
    return build_dataset(records)


def rows(mode, seq_length=50, micro_batch_size=1, **packing):
    packing = PackingConfig(**{"share_prefix": "off", **packing})
    return DataConfig(
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        global_batch_size=4,
        packing=packing,
        on_too_long=mode,
    )


def test_the_message_has_file_and_line_and_what_would_fit(dataset, prepare_stage):
    with pytest.raises(UserError) as error:
        GlobalBatchSampler(prepare_stage(dataset, "fusepo", loss="dpo"), rows("stop"), 1, 1)
    message = str(error.value)
    assert "in.jsonl:13: prompt 3 needs 63 positions in one row of 50: set data.seq_length to at least 63" in message
    assert "2 of 12 prompts do not fit, all fit data.seq_length=125" in message  # a pair: 63 + 62 in one row
    assert "data.on_too_long=skip, truncate" in message and "\n" not in message
    with pytest.raises(UserError, match="prompt 3: 2 sequences .a pair., 125 positions, do not fit the 1 x 70 .* 63"):
        GlobalBatchSampler(prepare_stage(dataset, "fusepo", loss="dpo"), rows("stop", 70), 1, 1)


@pytest.mark.parametrize("stage", STAGES)
def test_skip_leaves_whole_prompts_out(dataset, prepare_stage, stage):
    whole = prepare_stage(dataset, **STAGES[stage])
    data = rows("skip", seq_length=30 if stage in ("sft", "kto") else 60, micro_batch_size=2)
    prepared = fitted(whole, data)
    gone = {p for p in LONG if LONG[p] + 2 > data.seq_length or stage == "wrpo"}  # three in two rows
    assert set(whole.group_ids) - set(prepared.group_ids) == gone
    assert prepared.counts["prompts_too_long"] == len(gone) and prepared.counts["responses_cut_to_fit"] == 0
    assert prepared.fitted.startswith("skip ")
    for name in ("response_ids", "lengths", "weights", "source_ids"):
        owner = np.repeat(whole.group_ids, np.diff(whole.sequence_offsets))
        expected = getattr(whole, name)[~np.isin(owner, list(gone))]
        np.testing.assert_array_equal(getattr(prepared, name), expected)
    from fuserl_megatron.config.schema import Config

    check_prepared(Config(), prepared)  # the weights of each prompt still sum to 1
    names = [f"mean_weight/{s}" for s in "ab"]
    assert [prepared.statistics[n] for n in names] == pytest.approx([whole.statistics[n] for n in names])
    sampler = GlobalBatchSampler(prepared, data, 1, 2)
    seen = [
        i for step in range(sampler.steps_per_epoch) for b in batches(sampler, step) for i in b.response_ids_N.tolist()
    ]
    assert sorted(seen) == sorted(prepared.response_ids.tolist())


def batches(sampler, step):
    plan = sampler.step(step)
    return [b for rank in range(sampler.dp_size) for b in sampler.micro_batches(plan, rank)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", [{}, {"share_prefix": "on"}, {"enabled": False}], ids=["packed", "shared", "row each"])
def test_truncate_cuts_on_the_right_as_far_as_needed(dataset, prepare_stage, stage, how):
    whole = prepare_stage(dataset, **STAGES[stage])
    data = rows("truncate", seq_length=33, micro_batch_size=3, **how)
    prepared = fitted(whole, data)
    assert prepared.num_prompts == whole.num_prompts and prepared.counts["responses_cut_to_fit"] > 0
    sampler = GlobalBatchSampler(prepared, data, 1, 1)  # everything fits now
    for step in range(sampler.steps_per_epoch):
        for batch in batches(sampler, step):
            for n in range(batch.num_sequences):
                labels = batch.labels_BS[batch.sequence_ids_BS == n].tolist()
                group, response = int(batch.prompt_ids_N[n]), int(batch.response_ids_N[n])
                full = dataset.response(group, response).tolist()
                assert labels == full[: len(labels)] and len(labels) == int(batch.lengths_N[n])
                if group not in LONG:
                    assert labels == full
                elif len(labels) < len(full):
                    assert labels[-1] != full[-1]  # the end of turn is lost
    cut = prepared.lengths < whole.lengths
    for prompt in LONG:
        of = (np.repeat(whole.group_ids, np.diff(whole.sequence_offsets)) == prompt) & cut
        assert prepared.lengths[of].size == 0 or np.ptp(prepared.lengths[of]) == 0  # all to the same length
    if stage == "sft" and how == {}:
        assert prepared.lengths.max() == 32  # 2 prompt tokens + 32 - 1 = the row


def test_a_prompt_without_room_for_a_token_is_left_out(build_dataset, make_record, prepare_stage):
    data = build_dataset([make_record(prompt="w1 " * 40), make_record(prompt="w2 w3")])
    prepared = fitted(prepare_stage(data), rows("truncate", seq_length=20))
    assert prepared.group_ids.tolist() == [1]
    assert (prepared.counts["prompts_too_long"], prepared.counts["responses_cut_to_fit"]) == (1, 0)
    with pytest.raises(UserError, match="no prompt fits: 2 of 2 prompts do not fit"):
        fitted(prepare_stage(data), rows("truncate", seq_length=1))


def test_what_fits_is_left_as_it_is(dataset, prepare_stage):
    prepared = prepare_stage(dataset)
    for mode in ("stop", "skip", "truncate"):
        assert fitted(prepared, rows(mode, 100)) is prepared


def test_the_reference_of_cut_responses_is_another(dataset, prepare_stage):
    """Views say what they change: the cache's key follows."""
    prepared = prepare_stage(dataset, **STAGES["kto"])
    marks = [prepared.dataset.fingerprint, mismatched(prepared).dataset.fingerprint]
    for length in (33, 40):
        cut = fitted(prepared, rows("truncate", length))
        marks += [cut.dataset.fingerprint, mismatched(cut).dataset.fingerprint, cut.fitted]
    assert marks[0] is None and len(set(marks)) == len(marks)


def test_shares_of_the_prompts_are_counted(build_dataset, make_record, prepare_stage):
    sizes = [3] * 985 + [150] * 6 + [300] * 9
    records = [make_record(prompt=f"w{p % 100} w{p // 100}", response="w5 " * n) for p, n in enumerate(sizes)]
    with pytest.raises(UserError) as error:
        GlobalBatchSampler(prepare_stage(build_dataset(records)), rows("stop", 100), 1, 1)
    said = "15 of 1000 prompts do not fit, 99 % fit data.seq_length=256, all fit data.seq_length=384"
    assert said in str(error.value)


def test_needed_length_is_the_shortest_that_fits():
    rng = np.random.default_rng(0)
    for _ in range(200):
        chunks, count = rng.integers(1, 40, rng.integers(1, 6)).tolist(), int(rng.integers(1, 4))
        data = dataclasses.replace(rows("stop"), micro_batch_size=count)
        length = _needed_length(chunks, data)
        assert fits(chunks, length, count) and not fits(chunks, length - 1, count)
