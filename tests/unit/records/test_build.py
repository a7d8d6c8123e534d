"""`build`: what it writes, what it counts, and that it leaves nothing half-written."""

import ctypes
import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from groups import read_group

from fuserl_megatron.config.schema import BuildConfig, ObjectiveConfig
from fuserl_megatron.data.dataset import FusedDataset, Manifest
from fuserl_megatron.data.pairs import prepare
from fuserl_megatron.records import build as build_module
from fuserl_megatron.records.build import build
from fuserl_megatron.records.summary import print_summary
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import file_sha256


def listing(directory):
    return sorted(os.listdir(directory))


def test_groups_tokens_and_manifest(build_dataset, make_record, tmp_path):
    data = build_dataset(
        [
            make_record(source="a", response="w3", reward=0.18),
            make_record(source="b", response="w4 w5", reward=0.165),
            make_record(source="c", response="w6", reward=0.172),
            make_record(source="d", response="w7", reward=0.151),
            make_record(source="a", response="w8 w9", reward=0.1),
            make_record(prompt="w10", source="a", response="w3", reward=-1),
        ],
        reward_temperature=0.01,
    )
    first, second = read_group(data, 0), read_group(data, 1)
    assert first.prompt_tokens.tolist() == [3, 4] and second.prompt_tokens.tolist() == [12]
    assert [r.tolist() for r in first.responses] == [[5, 1], [6, 7, 1], [8, 1], [9, 1], [10, 11, 1]]
    assert first.source_ids.tolist() == [0, 1, 2, 3, 0] and second.first_response_id == 5
    assert first.rewards.tolist() == [0.18, 0.165, 0.172, 0.151, 0.1] and second.rewards.tolist() == [-1.0]
    manifest = data.manifest
    assert manifest.hash == data.hash == file_sha256(tmp_path / "fused" / "groups.arrow")
    assert (manifest.sources, manifest.num_prompts, manifest.num_responses) == (["a", "b", "c", "d"], 2, 6)
    # METHOD's weights at tau 0.01, averaged with the second prompt's (1, 0, 0, 0)
    weights = [0.5789, 0.1292, 0.2601, 0.0319]
    for name, first_weight, second_weight in zip("abcd", weights, (1, 0, 0, 0), strict=True):
        assert manifest.per_source[name]["mean_weight"] == pytest.approx((first_weight + second_weight) / 2, abs=5e-5)
    assert manifest.per_source["a"]["win_rate"] == 1.0 and manifest.per_source["b"]["win_rate"] == 0.0
    assert manifest.per_source["a"]["mean_reward"] == pytest.approx((0.18 + 0.1 - 1) / 3)
    effective = math.exp(-sum(w * math.log(w) for w in weights))
    assert manifest.effective_number_of_sources["max"] == pytest.approx(effective, abs=1e-3)
    assert manifest.effective_number_of_sources["min"] == 1.0
    assert manifest.tokens["prompt_max"] == 2 and manifest.tokens["total_max"] == 5 and manifest.max_token_id == 12
    assert manifest.inputs[0]["sha256"] == file_sha256(manifest.inputs[0]["name"])
    assert Manifest.read(tmp_path / "fused") == manifest and listing(tmp_path / "fused") == [
        "groups.arrow",
        "manifest.json",
    ]


def test_many_groups_survive_the_record_batches(build_dataset, make_record):
    """More groups than one Arrow record batch holds, of uneven sizes."""
    rng = np.random.default_rng(0)
    expected = []
    for p in range(2500):
        words = " ".join(f"w{i}" for i in rng.integers(0, 100, rng.integers(1, 4)))
        expected.append((f"w{p % 100} w{p // 100} {words}", [f"w{i} w{n}" for n, i in enumerate(range(1 + p % 3))]))
    data = build_dataset([make_record(prompt=p, response=r) for p, responses in expected for r in responses])
    ids = {f"w{i}": i + 2 for i in range(100)}
    assert data.num_groups == 2500 and data.num_responses == sum(len(r) for _, r in expected)
    assert data.prompt_lengths.sum() == sum(len(p.split()) for p, _ in expected)
    next_response = 0
    for i, (prompt, responses) in enumerate(expected):
        group = read_group(data, i)
        assert group.prompt_tokens.tolist() == [ids[w] for w in prompt.split()]
        assert [r.tolist() for r in group.responses] == [[*(ids[w] for w in r.split()), 1] for r in responses]
        assert group.first_response_id == next_response
        next_response += len(responses)


def test_every_degenerate_case_is_counted(build_dataset, make_record, tmp_path, capsys):
    long_prompt = "w1 w2 w3 w4 w5 w6 w7 w8"
    records = [
        make_record(prompt="w1", source="a", response="w1", reward=1),
        make_record(prompt="w1", source="a", response="w2", reward=1),  # equal rewards
        make_record(prompt="w1", source="b", response="w3", reward=1),  # a single response
        make_record(prompt="w1", source="b", response="w3", reward=1),  # duplicate
        make_record(prompt="w2", source="a", response="w1 w2 w3 w4 w5 w6 w7 w8", reward=1),  # truncated, and then ...
        make_record(prompt="w2", source="a", response="w1 w2 w3 w4 w5 w6 w7 w9", reward=2),  # ... equal tokens
        make_record(prompt="w2", source="b", response="w3 </s>", reward=float("nan")),
        make_record(prompt="w2", source="b", response="w3 </s>", reward=3, id=1),
        make_record(prompt=long_prompt, source="a", response="w3", reward=3),
        make_record(prompt=long_prompt, source="b", response="w3", reward=3),
    ]
    data = build_dataset(records, max_length=8, on_bad_record="skip")
    counts = {name: n for name, n in data.manifest.counts.items() if n}
    assert counts == {
        "records": 10,
        "rejected_records": 3,
        "duplicate_records": 1,
        "prompts_without_response": 1,
        "truncated_responses": 2,
        "responses_with_special_tokens": 1,
        "no_pair_single_response": 2,
        "no_pair_equal_rewards": 1,
        "no_pair_equal_tokens": 1,
        "prompts_without_pair": 2,
    }
    assert data.manifest.rejected == {"non_finite_reward": 1, "prompt_too_long": 2}
    assert data.manifest.unknown_keys == {"id": 1}
    lines = [json.loads(line) for line in (tmp_path / "fused" / "rejected.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [7, 9, 10]
    assert lines[1]["record"]["prompt"] == [{"role": "user", "content": long_prompt}]
    print_summary(data.manifest)
    printed = capsys.readouterr().out
    for text in (
        "rejected_records 3",
        "prompt_too_long 2",
        "id (1)",
        "effective number of sources",
        "source a, prompts 2",
    ):
        assert text in printed


def test_a_prompt_that_is_too_long_stops_with_file_and_line(build_dataset, make_record, tmp_path):
    with pytest.raises(UserError) as error:
        build_dataset([make_record(), make_record(prompt="w1 w2 w3 w4")], max_length=4)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'in.jsonl'}:2: field 'prompt': the prompt has 4 tokens")
    assert "max_length=4" in message and "raise max_length" in message and "on_bad_record=skip" in message
    assert listing(tmp_path) == ["in.jsonl"]


def test_the_temperature_is_required(build_dataset, make_record, tmp_path):
    records = [make_record(source=s, reward=r) for s, r in zip("abcd", (0.18, 0.165, 0.172, 0.151), strict=True)]
    with pytest.raises(UserError) as error:
        build_dataset(records, reward_temperature=float("nan"))
    message = str(error.value)
    assert "reward_temperature=auto with reward_accuracy=A" in message and "\n" not in message
    with pytest.raises(UserError, match="reward_temperature=-1"):
        build_dataset(records, reward_temperature=-1.0)
    assert listing(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(("standardization", "first_weight"), [("none", 0.5), ("prompt", 0.881), ("dataset", 0.503)])
def test_standardisation_changes_the_weights_not_the_stored_rewards(
    build_dataset, make_record, standardization, first_weight
):
    records = [
        make_record(source="a", reward=0.001),
        make_record(source="b", reward=-0.001),
        make_record(prompt="w9", source="a", reward=0.2),
        make_record(prompt="w9", source="b", reward=-0.2),
    ]
    data = build_dataset(records, reward_temperature=1.0, reward_standardization=standardization)
    assert data.rewards.tolist() == [0.001, -0.001, 0.2, -0.2]
    from fuserl_megatron.data.rewards import reward_table
    from fuserl_megatron.objectives.weights import source_weights

    table = reward_table(data.response_offsets, data.source_ids, data.rewards, 2)
    weights = source_weights(table.scores(standardization, "max"), None, 1.0)
    assert float(weights[0, 0]) == pytest.approx(first_weight, abs=2e-3)


def test_an_existing_output_needs_force_and_other_files_are_never_replaced(build_dataset, make_record, tmp_path):
    first = build_dataset([make_record()]).hash
    with pytest.raises(UserError, match="set force=true"):
        build_dataset([make_record(response="w9")])
    assert FusedDataset(tmp_path / "fused").hash == first
    assert build_dataset([make_record(response="w9")], force=True).hash != first
    (tmp_path / "fused" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that are not a fused data set's \(notes.txt\)"):
        build_dataset([make_record()], force=True)
    with pytest.raises(UserError, match="is a file"):
        build_dataset([make_record()], output=str(tmp_path / "in.jsonl"), force=True)
    assert listing(tmp_path) == ["fused", "in.jsonl"]


def test_same_input_same_hash(build_dataset, make_record, tmp_path):
    records = [make_record(source=s, response=r, reward=i) for i, (s, r) in enumerate([("a", "w1"), ("b", "w2")])]
    first = build_dataset(records)
    assert build_dataset(records, output=str(tmp_path / "again")).hash == first.hash


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left"), OSError(errno.EIO, "I/O")]
)
@pytest.mark.parametrize("where", ["sync", "publish"])
def test_an_interrupted_build_leaves_the_old_output_and_nothing_else(
    build_dataset, make_record, tmp_path, monkeypatch, failure, where
):
    old = build_dataset([make_record()]).hash

    def fail(*args):
        raise failure

    monkeypatch.setattr(build_module, where, fail)
    with pytest.raises((KeyboardInterrupt, OSError, UserError)):
        build_dataset([make_record(response="w9")], force=True)
    assert FusedDataset(tmp_path / "fused").hash == old and listing(tmp_path) == ["fused", "in.jsonl"]


def test_a_failing_rename_puts_the_old_output_back(build_dataset, make_record, tmp_path, monkeypatch):
    old = build_dataset([make_record()]).hash
    rename = os.rename

    def fail_on_the_new_one(source, target):
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "I/O error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_on_the_new_one)
    with pytest.raises(UserError, match="I/O error"):
        build_dataset([make_record(response="w9")], force=True)
    assert FusedDataset(tmp_path / "fused").hash == old and listing(tmp_path) == ["fused", "in.jsonl"]


@pytest.fixture
def full_disk(tmp_path):
    """A mounted file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, b"size=64k") != 0:
        pytest.skip(f"mounting a tmpfs is not permitted here ({os.strerror(ctypes.get_errno())})")
    yield disk
    libc.umount2(str(disk).encode(), 2)


def test_a_full_disk(full_disk, tmp_path, tokenizers_dir, write_records, make_record):
    words = " ".join(f"w{i}" for i in range(100))
    path = write_records([make_record(prompt=f"w{i // 100} w{i % 100}", response=words) for i in range(1000)])
    config = BuildConfig(
        inputs=(path,), output=str(full_disk / "fused"), tokenizer=tokenizers_dir["words"], reward_temperature=1.0
    )
    with pytest.raises(UserError, match="no space left on the disk of .*: free some or set another output") as error:
        build(config, progress=False)
    assert "\n" not in str(error.value) and listing(full_disk) == []


def test_refusing_what_is_not_a_fused_data_set(build_dataset, make_record, tmp_path):
    with pytest.raises(UserError, match="is not a fused data set .*make one with `fuserl build`"):
        FusedDataset(tmp_path)
    build_dataset([make_record()])
    groups, manifest = tmp_path / "fused" / "groups.arrow", tmp_path / "fused" / "manifest.json"
    whole, text = groups.read_bytes(), manifest.read_text()

    def refused(says):
        with pytest.raises(UserError, match=says) as error:
            FusedDataset(tmp_path / "fused")
        assert "\n" not in str(error.value)

    groups.write_bytes(whole[:-1])
    refused("the manifest says")
    changed = bytearray(whole)
    changed[len(changed) // 2] ^= 1
    groups.write_bytes(changed)
    refused("its content is not what the manifest describes")
    groups.write_bytes(whole)
    manifest.write_text(text.replace('"format_version": 3', '"format_version": 99'))
    refused("format version 99, this program reads 1")
    manifest.write_text(text.replace('"max_length"', '"max_size"'))
    refused("fields missing or unknown")
    manifest.write_text(text[:50])
    refused("is not readable")


def test_the_arrow_file_is_plain_arrow(build_dataset, make_record, tmp_path):
    build_dataset([make_record(response="w3 w4")])
    with pa.memory_map(str(tmp_path / "fused" / "groups.arrow")) as source:
        rows = pa.ipc.open_file(source).read_all().to_pylist()
    row = {"prompt": [3, 4], "responses": [[5, 6, 1]], "source_ids": [0], "rewards": [0.5], "truncated": [False]}
    assert rows == [{**row, "inputs": [0], "lines": [1]}]


def test_a_response_can_be_traced_to_its_line(write_records, make_record, build_dataset):
    one = write_records([make_record(), "", make_record(prompt="w9")], "one.jsonl")
    two = write_records([make_record(response="w5"), make_record(prompt="w9", response="w6")], "two.jsonl")
    data = build_dataset([], inputs=(one, two))
    assert [data.place(i) for i in range(4)] == [f"{one}:1", f"{two}:1", f"{one}:3", f"{two}:2"]


def test_nothing_is_left_when_every_record_is_bad(build_dataset, make_record, tmp_path):
    with pytest.raises(UserError, match=r"every record was rejected \(prompt_too_long 1\)"):
        build_dataset([make_record(prompt="w1 w2 w3")], max_length=3, on_bad_record="skip")
    assert listing(tmp_path) == ["in.jsonl"] and not Path(tmp_path / "fused").exists()


def test_uniform_fusion_is_written_as_json_and_read_back(build_dataset, make_record):
    """JSON has no infinity: json.dumps would write one that other programs refuse."""
    dataset = build_dataset([make_record(), make_record(source="b")], reward_temperature=float("inf"))
    text = (dataset.path / "manifest.json").read_text()
    assert '"reward_temperature": "inf"' in text and "Infinity" not in text
    assert dataset.manifest.reward_temperature == float("inf") == prepare(dataset, ObjectiveConfig()).reward_temperature
