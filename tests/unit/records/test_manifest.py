"""manifest.json: covered by its own hash; whatever stands in it is refused in one line or harmless; format 1 opens."""

import hashlib
import json

import pytest

from fuserl_megatron.config.schema import ObjectiveConfig
from fuserl_megatron.data.dataset import FusedDataset, Manifest
from fuserl_megatron.data.manifest import FORMAT_VERSION, NEW_IN, OWN_HASH
from fuserl_megatron.data.pairs import prepare
from fuserl_megatron.util.errors import UserError

VALUES = [None, True, -1, 0, 3, 10**20, 1.5, float("nan"), float("inf"), "", "x", [], {}]
"""What a field is set to, one after the other."""


@pytest.fixture(scope="module")
def records():
    cases = [(p, s, n) for p in (1, 2) for s in "ab" for n in (1, 2)]
    return [dict(prompt=f"w{p}", source=s, response=f"w{p} w{n}", reward=n) for p, s, n in cases]


def as_format(version, directory):
    """The same data set as an earlier version wrote it."""
    values = json.loads((directory / "manifest.json").read_text()) | {"format_version": version}
    del values[OWN_HASH]
    for later in range(version + 1, FORMAT_VERSION + 1):
        for name in set(NEW_IN[later]) - {OWN_HASH}:
            del values[name]
    own = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return values if version == 1 else values | {OWN_HASH: own}


def opened(directory, values):
    """'refused' or 'harmless'; what it prepares must then be what the untouched data set gives."""
    (directory / "manifest.json").write_text(json.dumps(values))
    try:
        dataset = FusedDataset(directory)
        prepared = prepare(dataset, ObjectiveConfig(stage="fusepo", loss="dpo"))
        assert prepared.num_prompts == 2 and dataset.place(0)
    except UserError as error:
        assert "\n" not in str(error)
        return "refused"
    return "harmless"


def test_every_edit_of_every_field_is_refused(build_dataset, records):
    """286 and more: fields times 13 values. The file covers itself: nothing changed opens."""
    directory = build_dataset(records).path
    whole = json.loads((directory / "manifest.json").read_text())
    assert opened(directory, whole) == "harmless"
    changed = {name: [v for v in VALUES if (v, type(v)) != (whole[name], type(whole[name]))] for name in whole}
    edits = [(name, value) for name, values in changed.items() for value in values]
    assert len(edits) > 286
    assert {(n, str(v)) for n, v in edits if opened(directory, whole | {n: v}) != "refused"} == set()
    nested = whole | {"per_source": whole["per_source"] | {"a": {"mean_reward": 9.0}}}
    assert opened(directory, nested) == "refused"


def test_format_1_opens_and_its_wrong_types_are_one_line(build_dataset, records):
    """It has no hash: whatever has the right type must at least do no harm."""
    directory = build_dataset(records).path
    old = as_format(1, directory)
    assert opened(directory, old) == "harmless"
    assert Manifest.read(directory).chat_template is Manifest.read(directory).identity is None
    outcomes = {(name, str(v)): opened(directory, old | {name: v}) for name in old for v in VALUES}
    assert list(outcomes.values()).count("refused") > 200
    for name in ("sources", "tokens", "num_prompts", "score_aggregation", "hash", "num_bytes"):
        assert all(how == "refused" for (field, _), how in outcomes.items() if field == name), name


def test_format_2_opens_without_the_field_that_came_after_it(build_dataset, records):
    directory = build_dataset(records).path
    old = as_format(2, directory)
    assert "temperature_rule" not in old and opened(directory, old) == "harmless"
    assert Manifest.read(directory).temperature_rule is None and Manifest.read(directory).identity
    assert opened(directory, old | {"temperature_rule": None}) == "refused"
    assert opened(directory, old | {"reward_temperature": 7.0}) == "refused"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format_version": ' + "9" * 5000 + "}", "\udcff", "3", "null"])
def test_what_is_no_manifest_is_one_line(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        Manifest.read(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_rewards_whose_mean_would_overflow_are_bad_records(build_dataset, make_record):
    large = [make_record(source=s, reward=1.7e308) for s in "ab"]
    with pytest.raises(UserError, match="in.jsonl:1: field 'reward' is 1.7e.308: it must be at most 1e.100"):
        build_dataset(large)
    for how in ("none", "prompt", "dataset"):
        fine = [make_record(source=s, reward=r) for s, r in (("a", 1e100), ("b", -1e100))]
        assert build_dataset(fine, force=True, reward_standardization=how, score_aggregation="mean").num_groups == 1
