"""What each preference loss is made of, against plain loops; how it is packed; what is refused."""

import math

import numpy as np
import pytest

from fuserl_megatron.config.schema import DataConfig, PackingConfig
from fuserl_megatron.data.prepared import mismatched
from fuserl_megatron.data.sampler import GlobalBatchSampler
from fuserl_megatron.util.errors import UserError

REWARDS = {  # prompt -> source -> rewards of its responses
    0: {"a": [0.1, 0.5, 0.3], "b": [0.2, 0.4], "me": [0.3, 0.6, 0.1]},
    1: {"a": [0.2], "b": [0.3, 0.3], "me": [0.0, 0.2]},
    2: {"b": [0.9, 0.1], "me": [0.5]},
    3: {"me": [0.1, 0.2]},
}


@pytest.fixture
def data(build_dataset, make_record):
    records = []
    for p, sources in REWARDS.items():
        for s, (source, rewards) in enumerate(sources.items()):
            for n, reward in enumerate(rewards):
                logps = {"source_mean_logps": {"a": -1.0 - n, "b": -2.0}} if source != "me" and p == 0 else {}
                response = f"w{s} w{n} " + "w9 " * (p + n)
                records.append(make_record(prompt=f"w{p} w7", source=source, response=response, reward=reward, **logps))
    return build_dataset(records)


def softmax(scores):
    exps = {k: math.exp(s / 0.1) for k, s in scores.items()}
    return {k: e / sum(exps.values()) for k, e in exps.items()}


def batches_of(prepared, packing=True, rows=3, seq_length=64, share="off"):
    data = DataConfig(
        path="x",
        seq_length=seq_length,
        micro_batch_size=rows,
        global_batch_size=4,
        packing=PackingConfig(enabled=packing, share_prefix=share),
        shuffle=False,
    )
    sampler = GlobalBatchSampler(prepared, data, 0, 1)
    return sampler.micro_batches(sampler.step(0), 0)


@pytest.mark.parametrize("packing", [True, False])
def test_rloo_takes_every_response_of_a_source_together(data, prepare_stage, packing):
    prepared = prepare_stage(data, "fusepo", loss="rloo")
    assert prepared.num_prompts == 4 and prepared.response_ids.tolist() == list(range(data.num_responses))
    assert prepared.counts == {"zero_weight": 0, "sources_without_advantage": 3}
    seen = {}
    for batch in batches_of(prepared, packing):
        for group in batch.group_ids_N.unique().tolist():
            rows = (batch.group_ids_N == group).nonzero()[:, 0].tolist()
            assert all(row < batch.num_sequences for row in rows)
            (prompt,), (source,) = ({int(t[r]) for r in rows} for t in (batch.prompt_ids_N, batch.source_ids_N))
            seen[prompt, source] = [
                (float(batch.advantages_N[r]), float(batch.weights_N[r]), bool(batch.best_N[r])) for r in rows
            ]
    for p, sources in REWARDS.items():
        weights = softmax({s: max(r) for s, r in sources.items()})
        for source, rewards in sources.items():
            found = seen.pop((p, data.sources.index(source)))
            mean = [(sum(rewards) - r) / (len(rewards) - 1) if len(rewards) > 1 else r for r in rewards]
            assert [a for a, _, _ in found] == pytest.approx(
                [r - m for r, m in zip(rewards, mean, strict=True)], abs=1e-12
            )
            assert [w for _, w, _ in found] == pytest.approx([weights[source]] * len(rewards), rel=1e-12)
            assert [b for _, _, b in found] == [i == rewards.index(max(rewards)) for i in range(len(rewards))]
    assert not seen


@pytest.mark.parametrize("packing", [True, False])
def test_wrpo_takes_the_target_s_own_pair_and_the_best_of_the_others(data, prepare_stage, packing):
    prepared = prepare_stage(data, "fusepo", loss="wrpo", target_source="me")
    assert prepared.group_ids.tolist() == [0, 1] and prepared.pair_weights.tolist() == [1.0, 1.0]
    assert prepared.counts["prompts_without_own_pair"] == 1 and prepared.counts["prompts_without_other_source"] == 1
    found = {}
    for batch in batches_of(prepared, packing):
        rewards = data.rewards[batch.response_ids_N.numpy()]
        for p in range(batch.chosen_index_P.numel()):
            ends = [int(getattr(batch, f"{name}_index_P")[p]) for name in ("source", "chosen", "rejected")]
            assert len({int(batch.prompt_ids_N[e]) for e in ends}) == 1
            names = [data.sources[int(batch.source_ids_N[e])] for e in ends]
            found[int(batch.prompt_ids_N[ends[0]])] = ([float(rewards[e]) for e in ends], names)
    assert found == {0: ([0.5, 0.6, 0.1], ["a", "me", "me"]), 1: ([0.3, 0.2, 0.0], ["b", "me", "me"])}
    with pytest.raises(UserError, match=r"objective.target_source=you: .* no such source \(it has: a, b, me\)"):
        prepare_stage(data, "fusepo", loss="wrpo", target_source="you")


def test_kto_takes_best_and_worst_one_by_one(data, prepare_stage):
    kto, dpo = prepare_stage(data, "fusepo", loss="kto"), prepare_stage(data, "fusepo", loss="dpo")
    assert kto.response_ids.tolist() == dpo.response_ids.tolist() and kto.chosen.size == 0
    first = np.repeat(dpo.sequence_offsets[:-1], np.diff(dpo.pair_offsets))
    assert np.flatnonzero(kto.of_sequences["desirable_N"]).tolist() == sorted((first + dpo.chosen).tolist())
    per_prompt = np.add.reduceat(kto.weights, kto.sequence_offsets[:-1])
    assert per_prompt == pytest.approx(1.0)
    for p, weight in zip(first + dpo.rejected, dpo.pair_weights, strict=True):
        assert kto.weights[p] == weight / 2
    split = [set(b.prompt_ids_N.tolist()) for b in batches_of(kto, rows=1, seq_length=16)]
    assert sum(map(len, split)) > kto.num_prompts  # a prompt's responses may go anywhere


def test_mismatched_responses_stand_under_the_next_prompt(data, prepare_stage):
    prepared = prepare_stage(data, "fusepo", loss="kto")
    view = mismatched(prepared)
    prompts = prepared.group_ids.tolist()
    for group, following in zip(prompts, [*prompts[1:], prompts[0]], strict=True):
        assert view.dataset.prompt(group).tolist() == data.prompt(following).tolist()
    for batch in batches_of(view):
        for n, (group, response) in enumerate(
            zip(batch.prompt_ids_N.tolist(), batch.response_ids_N.tolist(), strict=True)
        ):
            labels = batch.labels_BS[batch.sequence_ids_BS == n].tolist()
            assert (
                labels == data.response(group, response)[: len(labels)].tolist() and len(labels) == batch.lengths_N[n]
            )
    assert mismatched(prepare_stage(data, "fusepo", loss="wrpo", target_source="me")) is not None


def test_mappo_gaps_and_infifpo_columns(data, prepare_stage, build_dataset, make_record):
    prepared = prepare_stage(data, "fusepo", loss="mappo")
    (batch,) = batches_of(prepared, rows=8)
    rewards = data.rewards[batch.response_ids_N.numpy()]
    assert batch.reward_gaps_P.numpy() == pytest.approx(rewards[batch.chosen_index_P] - rewards[batch.rejected_index_P])
    (batch,) = batches_of(prepare_stage(data, "fusepo", loss="infifpo"), rows=8)
    in_first = batch.prompt_ids_N[batch.chosen_index_P] == 0
    own = batch.pair_source_ids_P == data.sources.index("me")
    assert batch.source_present_PK[in_first & ~own].tolist() == [[True, True, False]] * 2
    assert not batch.source_present_PK[~in_first | own].any()
    assert batch.source_chosen_mean_logps_PK[0].tolist() == [-2.0, -2.0, 0.0]
    plain = build_dataset([make_record(response="w1"), make_record(response="w2", reward=3.0)], force=True)
    wanted = "infifpo reads the sources' own log-probabilities: add the field source_mean_logps"
    with pytest.raises(UserError, match=wanted):
        prepare_stage(plain, "fusepo", loss="infifpo")
    with pytest.raises(UserError, match="scale the rewards to \\[0, 1\\]"):
        prepare_stage(plain, "fusepo", loss="mappo")


@pytest.mark.parametrize(
    "value, problem",
    [
        ([1], "must be an object of source -> number"),
        ({"a": "x"}, "must be an object"),
        ({"a": 0.5}, "at most 0"),
        ({"c": -1.0}, r"names 'c': the sources are a"),
    ],
)
def test_source_mean_logps_are_checked(build_dataset, make_record, value, problem):
    with pytest.raises(UserError, match=rf"in.jsonl:1: field 'source_mean_logps' .*{problem}"):
        build_dataset([make_record(source_mean_logps=value)])


def test_a_group_larger_than_a_micro_batch_is_refused_with_its_size(data, prepare_stage):
    wanted = r"prompt 0: 3 sequences \(all responses of a source\) need a row each .*micro_batch_size to at least 3"
    with pytest.raises(UserError, match=wanted):
        batches_of(prepare_stage(data, "fusepo", loss="rloo"), packing=False, rows=2)


def test_degenerate_data(build_dataset, make_record, prepare_stage):
    equal = build_dataset([make_record(response=f"w{i}") for i in range(3)])
    with pytest.raises(UserError, match="no prompt has a pair .*sources_without_advantage 1"):
        prepare_stage(equal, "fusepo", loss="rloo")
    records = [make_record(response=f"w{i}", reward=i / 2) for i in range(2)] + [
        make_record(prompt="w5", response="w1")
    ]
    lone = prepare_stage(build_dataset(records, force=True), "fusepo", loss="rloo")
    assert lone.of_sequences["advantages_N"].tolist() == [-0.5, 0.5, 0.0] and lone.weights.tolist() == [1.0] * 3
