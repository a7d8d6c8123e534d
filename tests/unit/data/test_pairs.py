"""Selection, weights and pairs, against a plain loop over prompts and METHOD's numbers."""

import math
from collections import defaultdict

import numpy as np
import pytest
from groups import read_group

from fuserl_megatron.util.errors import UserError


def random_records(make_record, num_prompts=60, seed=0, drop=0.4):
    """Ragged: sources missing, single responses, equal rewards."""
    rng = np.random.default_rng(seed)
    records = []
    for p in range(num_prompts):
        entries = []
        for source in "abc":
            if entries and rng.random() < drop:
                continue
            rewards = rng.choice([0.1, 0.2, 0.3, 0.15], rng.integers(1, 5))
            entries += [(source, n, float(r)) for n, r in enumerate(rewards)]
        for source, n, reward in rng.permutation(np.array(entries, object)).tolist():
            response = f"w{ord(source) - 97} w{n} " + "w5 " * int(rng.integers(0, 4))
            records.append(make_record(prompt=f"w{p} w{p}", source=source, response=response.strip(), reward=reward))
    return records


def softmax(scores, tau):
    best = max(scores.values())
    exps = {k: math.exp((s - best) / tau) for k, s in scores.items()}
    return {k: e / sum(exps.values()) for k, e in exps.items()}


def by_source(group):
    found = defaultdict(list)
    for i, (k, r) in enumerate(zip(group.source_ids.tolist(), group.rewards.tolist(), strict=True)):
        found[k].append((group.first_response_id + i, r))
    return found


def slow_fusesft(data, tau):
    for g in range(data.num_groups):
        sources = by_source(read_group(data, g))
        weights = softmax({k: max(r for _, r in v) for k, v in sources.items()}, tau)
        # the first of the best
        yield {next(i for i, r in v if r == max(r for _, r in v)): weights[k] for k, v in sources.items()}


def slow_top_m(data, tau, m):
    for g in range(data.num_groups):
        group = read_group(data, g)
        ranked = sorted(
            ((group.first_response_id + i, r) for i, r in enumerate(group.rewards)), key=lambda ir: (-ir[1], ir[0])
        )
        yield softmax(dict(ranked[:m]), tau)


def slow_fusepo(data, tau, low=-math.inf, high=math.inf):
    for g in range(data.num_groups):
        pairs = {}
        for k, v in by_source(read_group(data, g)).items():
            top, bottom = max(r for _, r in v), min(r for _, r in v)
            if top > bottom and low <= top - bottom <= high:
                pairs[k] = (next(i for i, r in v if r == top), next(i for i, r in v if r == bottom), top)
        if pairs:
            weights = softmax({k: p[2] for k, p in pairs.items()}, tau)
            yield g, {(chosen, rejected, k): weights[k] for k, (chosen, rejected, _) in pairs.items()}


def sequences_of(prepared, p):
    return slice(prepared.sequence_offsets[p], prepared.sequence_offsets[p + 1])


def test_fusesft_against_a_plain_loop(build_dataset, make_record, prepare_stage):
    data = build_dataset(random_records(make_record))
    for settings, expected in [
        ({}, list(slow_fusesft(data, 0.1))),
        ({"selection": "top_m", "top_m": 2}, list(slow_top_m(data, 0.1, 2))),
        ({"selection": "top_m"}, list(slow_top_m(data, 0.1, 4))),
    ]:
        prepared = prepare_stage(data, **settings)
        assert prepared.num_prompts == data.num_groups == len(expected)
        for p, weights in enumerate(expected):
            rows = sequences_of(prepared, p)
            actual = dict(zip(prepared.response_ids[rows].tolist(), prepared.weights[rows].tolist(), strict=True))
            assert actual == pytest.approx(weights, rel=1e-12)
        np.testing.assert_array_equal(prepared.lengths, data.response_lengths[prepared.response_ids])
        np.testing.assert_array_equal(prepared.source_ids, data.source_ids[prepared.response_ids])


@pytest.mark.parametrize("gaps", [{}, {"min_reward_gap": 0.08}, {"max_reward_gap": 0.12}])
def test_fusepo_against_a_plain_loop(build_dataset, make_record, prepare_stage, gaps):
    data = build_dataset(random_records(make_record))
    prepared = prepare_stage(data, "fusepo", **gaps)
    expected = dict(slow_fusepo(data, 0.1, gaps.get("min_reward_gap", -math.inf), gaps.get("max_reward_gap", math.inf)))
    assert prepared.group_ids.tolist() == list(expected)
    assert prepared.counts["prompts_without_pair"] == data.num_groups - len(expected)
    assert (prepared.counts["no_pair_reward_gap"] > 0) == bool(gaps)
    for p, pairs in enumerate(expected.values()):
        ids = prepared.response_ids[sequences_of(prepared, p)]
        rows = slice(prepared.pair_offsets[p], prepared.pair_offsets[p + 1])
        keys = zip(
            ids[prepared.chosen[rows]], ids[prepared.rejected[rows]], prepared.pair_source_ids[rows], strict=True
        )
        actual = {tuple(int(x) for x in key): w for key, w in zip(keys, prepared.pair_weights[rows], strict=True)}
        assert actual == pytest.approx(pairs, rel=1e-12)
        assert sorted(ids) == sorted(i for key in pairs for i in key[:2])  # nothing that is in no pair
        assert prepared.pair_weights[rows].sum() == pytest.approx(1, abs=1e-12)
    assert not prepared.weights.any()


def test_weights_of_sources_without_a_pair_go_to_the_others(build_dataset, make_record, prepare_stage):
    records = [
        make_record(source=s, response=f"w{i}", reward=r)
        for i, (s, r) in enumerate([("a", 0.9), ("b", 0.2), ("b", 0.1)])
    ]
    records += [make_record(source="c", response="w8", reward=0.3), make_record(source="c", response="w9", reward=0.0)]
    prepared = prepare_stage(build_dataset(records), "fusepo", 0.1)
    assert prepared.pair_source_ids.tolist() == [1, 2]
    assert prepared.pair_weights == pytest.approx(list(softmax({1: 0.2, 2: 0.3}, 0.1).values()), rel=1e-12)
    assert prepared.counts["no_pair_single_response"] == 1
    # the best source has no pair: the limit tau -> 0 must not become 0 / 0
    prepared = prepare_stage(build_dataset(records, force=True), "fusepo", 0.0)
    assert prepared.pair_source_ids.tolist() == [2] and prepared.pair_weights.tolist() == [1.0]


def test_temperature_override_and_limits(build_dataset, make_record, prepare_stage):
    records = [make_record(source=s, response=f"w{i}", reward=i) for i, s in enumerate("abcd")]
    data = build_dataset(records, reward_temperature=0.5)
    assert prepare_stage(data).weights == pytest.approx(list(softmax({i: float(i) for i in range(4)}, 0.5).values()))
    best = prepare_stage(data, temperature=0.0)
    assert best.weights.tolist() == [1.0] and best.source_ids.tolist() == [3] and best.counts["zero_weight"] == 3
    assert prepare_stage(data, temperature=math.inf).weights.tolist() == [0.25] * 4
    with pytest.raises(UserError, match="reward_temperature = -1.0"):
        prepare_stage(data, temperature=-1.0)
    with pytest.raises(UserError, match="top_m = 0"):
        prepare_stage(data, selection="top_m", top_m=0)


def test_source_order_and_record_order_change_nothing(build_dataset, make_record, prepare_stage):
    records = random_records(make_record, drop=0.0)

    def weights_by_text(records, **settings):
        data = build_dataset(records, force=True)
        prepared = prepare_stage(data, **settings)
        found = {}
        for p, group in enumerate(prepared.group_ids):
            rows = sequences_of(prepared, p)
            for i, w in zip(prepared.response_ids[rows], prepared.weights[rows], strict=True):
                source = data.sources[data.source_ids[i]]
                found[tuple(data.prompt(group)), source, data.rewards[i]] = float(w)
        return found

    shuffled = [records[i] for i in np.random.default_rng(1).permutation(len(records))]
    assert weights_by_text(shuffled) == pytest.approx(weights_by_text(records), rel=1e-12)


def test_no_pair_anywhere_says_why(build_dataset, make_record, prepare_stage):
    data = build_dataset([make_record(), make_record(source="b")])
    with pytest.raises(UserError, match=r"no prompt has a pair \(no_pair_single_response 2, prompts_without_pair 1\)"):
        prepare_stage(data, "fusepo")


def test_one_source_is_plain_sft(build_dataset, make_record, prepare_stage):
    prepared = prepare_stage(build_dataset([make_record(response=f"w{i}", reward=i) for i in range(3)]))
    assert prepared.weights.tolist() == [1.0] and prepared.response_ids.tolist() == [2]
