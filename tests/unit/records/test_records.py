"""Reading, checking and grouping of records: every complaint names file, line, field and remedy."""

import gzip
import io
import json
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from fuserl_megatron.records.grouping import load_groups
from fuserl_megatron.records.records import Rejects
from fuserl_megatron.util.errors import UserError

GOOD = {"prompt": "p", "source": "a", "response": "r", "reward": 0.5}

BAD = [
    ('{"prompt": "p", "source"', "malformed_json", "not valid JSON"),
    ("[1, 2]", "malformed_json", "must be a JSON object"),
    (json.dumps(GOOD)[:-1] + ', "meta": ' + "7" * 5000 + "}", "malformed_json", "not valid JSON"),
    (json.dumps(GOOD)[:-1] + ', "reward": 0.7}', "malformed_json", "'reward' stands twice in one object"),
    ({k: v for k, v in GOOD.items() if k != "prompt"}, "missing_prompt", "field 'prompt' is missing"),
    ({k: v for k, v in GOOD.items() if k != "source"}, "missing_source", "field 'source' is missing"),
    ({k: v for k, v in GOOD.items() if k != "response"}, "missing_response", "field 'response' is missing"),
    ({k: v for k, v in GOOD.items() if k != "reward"}, "missing_reward", "field 'reward' is missing"),
    ({**GOOD, "reward": None}, "missing_reward", "field 'reward' is null"),
    ({**GOOD, "reward": float("nan")}, "non_finite_reward", "field 'reward' is nan"),
    ({**GOOD, "reward": float("-inf")}, "non_finite_reward", "field 'reward' is -inf"),
    ({**GOOD, "reward": 10**400}, "non_finite_reward", "field 'reward' is inf"),
    ({**GOOD, "reward": "0.5"}, "wrong_type_reward", "field 'reward' must be a number"),
    ({**GOOD, "reward": True}, "wrong_type_reward", "field 'reward' must be a number"),
    ({**GOOD, "response": ""}, "empty_response", "field 'response' is empty"),
    ({**GOOD, "response": " \n"}, "empty_response", "field 'response' is empty"),
    ({**GOOD, "response": 3}, "wrong_type_response", "field 'response' must be a string"),
    ({**GOOD, "response": "\ud800"}, "invalid_text_response", "field 'response' contains half a surrogate pair"),
    ({**GOOD, "source": ""}, "empty_source", "field 'source' is empty"),
    ({**GOOD, "source": 1}, "wrong_type_source", "field 'source' must be a string"),
    ({**GOOD, "prompt": ""}, "empty_prompt", "field 'prompt' is empty"),
    ({**GOOD, "prompt": []}, "empty_prompt", "field 'prompt' is an empty list"),
    ({**GOOD, "prompt": 7}, "wrong_type_prompt", "field 'prompt' must be a string or a list"),
    ({**GOOD, "prompt": ["hi"]}, "wrong_type_prompt", "field 'prompt[0]' must be"),
    ({**GOOD, "prompt": [{"role": "user"}]}, "wrong_type_prompt", "field 'prompt[0]' must be"),
    ({**GOOD, "prompt": [{"role": "user", "content": " "}]}, "empty_prompt", "field 'prompt[0].content' is empty"),
    ({**GOOD, "prompt": [{"role": "", "content": "x"}]}, "empty_prompt", "field 'prompt[0].role' is empty"),
    (
        {**GOOD, "prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        "prompt_ends_with_assistant",
        "ends with an assistant message",
    ),
]


def load(path, on_bad_record="stop", file=None, **more):
    rejects = Rejects(on_bad_record, file)
    return load_groups([str(path)], rejects, **more), rejects


@pytest.mark.parametrize(("record", "kind", "says"), BAD, ids=[f"{i}-{b[1]}" for i, b in enumerate(BAD)])
def test_a_bad_record_stops_with_file_and_line_or_is_skipped_and_listed(write_records, tmp_path, record, kind, says):
    path = write_records([GOOD, "", record, {**GOOD, "response": "other"}])
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"{path}:3: ") and says in message and "on_bad_record=skip" in message
    assert "\n" not in message

    side_file = tmp_path / "side.jsonl"
    with open(side_file, "w") as file:
        loaded, rejects = load(path, "skip", file)
    assert rejects.counts == {kind: 1} and loaded.counts["records"] == 3
    assert [text for _, text in loaded.groups[0].responses] == ["r", "other"]
    (line,) = [json.loads(text) for text in side_file.read_text().splitlines()]
    assert (line["file"], line["line"], line["kind"]) == (path, 3, kind) and says in line["reason"]


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=re.escape(f"{path}:2: not UTF-8 (byte 13 of the line)")):
        load(path)


def test_grouping_order_and_canonical_prompts(write_records):
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "p"}]
    path = write_records(
        [
            {**GOOD, "prompt": "q", "source": "b"},
            GOOD,
            {**GOOD, "prompt": [{"role": "user", "content": "p"}], "response": "r2"},
            {**GOOD, "prompt": chat},
            {**GOOD, "prompt": "q", "source": "a"},
        ]
    )
    loaded, _ = load(path)
    assert [g.messages for g in loaded.groups] == [
        (("user", "q"),),
        (("user", "p"),),
        (("system", ""), ("user", "p")),
    ]
    assert loaded.sources == ["b", "a"]
    assert list(loaded.groups[1].responses) == [(1, "r"), (1, "r2")]
    assert list(loaded.groups[0].responses) == [(0, "r"), (1, "r")]


def test_duplicates_are_dropped_and_conflicts_are_bad_records(write_records):
    path = write_records([GOOD, GOOD, {**GOOD, "reward": 0.25}])
    with pytest.raises(UserError, match=re.escape(f"{path}:3: reward 0.25 for the same prompt, source and response")):
        load(path)
    loaded, rejects = load(path, "skip")
    assert loaded.counts["duplicates"] == 1 and rejects.counts == {"conflicting_reward": 1}
    assert list(loaded.groups[0].responses.values()) == [(0.5, (path, 1))]


def test_unknown_keys_are_counted_and_meta_is_not(write_records):
    message = {"role": "user", "content": "p", "name": "x"}
    loaded, _ = load(
        write_records([{**GOOD, "meta": 1, "id": 4}, {**GOOD, "prompt": [message], "response": "s", "id": 5}])
    )
    assert loaded.unknown_keys == {"id": 2, "prompt[].name": 1}


def test_source_filter_keeps_order_and_names_the_nearest(write_records):
    bad_but_unwanted = {**GOOD, "source": "b", "reward": float("nan")}
    path = write_records([GOOD, bad_but_unwanted, {**GOOD, "source": "mistral"}])
    loaded, _ = load(path, sources=("mistral", "a"))
    assert loaded.sources == ["mistral", "a"] and loaded.counts["filtered_by_source"] == 1
    with pytest.raises(UserError, match="'mistrel' does not appear in the inputs; did you mean mistral"):
        load(path, sources=("mistrel", "a"))


def test_gzip_parquet_and_globs_give_what_jsonl_gives(tmp_path, write_records):
    records = [GOOD, {**GOOD, "prompt": [{"role": "user", "content": "x"}], "reward": 1}]
    plain, _ = load(write_records(records))
    with gzip.open(tmp_path / "in.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    rows = [{**r, "prompt": [{"role": "user", "content": "p"}]} if r is GOOD else r for r in records]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    for name in ("in.jsonl.gz", "in.parquet"):
        loaded, _ = load(tmp_path / name)
        assert [g.messages for g in loaded.groups] == [g.messages for g in plain.groups]
        assert [[v[0] for v in g.responses.values()] for g in loaded.groups] == [[0.5], [1.0]]
    assert loaded.inputs[0]["records"] == 2 and len(loaded.inputs[0]["sha256"]) == 64
    both, _ = load(tmp_path / "*.*")
    assert both.counts["duplicates"] == 4 and [i["name"] for i in both.inputs] == sorted(map(str, tmp_path.glob("*.*")))


def test_parquet_row_and_column_errors(tmp_path):
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([GOOD, {**GOOD, "reward": None}]), path)
    with pytest.raises(UserError, match=re.escape(f"{path}:2: field 'reward' is null")):
        load(path)
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"prompt": "p"}]), path)
    with pytest.raises(UserError, match=r"column 'source' is missing \(columns: prompt\)"):
        load(path)
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="not a readable parquet file"):
        load(path)


def test_cut_gzip(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 99)[:-20])
    with pytest.raises(UserError, match="not a complete gzip file"):
        load(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: str(d), "is a directory without files that could be read"),
        (lambda d: str(d / "*.jsonl"), "no file matches"),
        (lambda d: str(d / "no.jsonl"), "does not exist"),
        (lambda d: "no.jsonl", "does not exist"),
        (lambda d: str(d / "in.txt"), "convert it to one record per line"),
    ],
)
def test_inputs_that_cannot_be_read(tmp_path, make, says):
    (tmp_path / "in.txt").write_text("x")
    with pytest.raises(UserError, match=says) as error:
        load(make(tmp_path))
    assert "\n" not in str(error.value)


def test_a_hub_name_without_a_network_says_so(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="without a network connection give a local file") as error:
        load("nobody/nothing-of-the-kind")
    assert "\n" not in str(error.value)


def test_nothing_usable_and_nothing_given(write_records):
    with pytest.raises(UserError, match=r"no usable record .*\(0 read\)"):
        load(write_records([""]))
    with pytest.raises(UserError, match="inputs is empty"):
        load_groups([], Rejects("stop"))
    with pytest.raises(UserError, match="on_bad_record='ignore' is unknown"):
        Rejects("ignore")


def arrow_text(*values: bytes) -> pa.Array:
    """A column of text that nobody checked."""
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


def test_one_value_of_a_parquet_file_that_is_no_text_is_one_bad_record(tmp_path):
    """And a time that Python's cannot hold, in a column that nobody reads, is none."""
    table = pa.table(
        {
            "prompt": ["p", "q", "r"],
            "source": ["a", "a", "a"],
            "response": arrow_text(b"good", b"\xff\xfe", b"good, too"),
            "reward": [0.0, 1.0, 2.0],
            "when": pa.array([2**62, 0, None], pa.timestamp("us")),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    rejects = Rejects("skip", io.StringIO())
    loaded = load_groups([str(tmp_path / "in.parquet")], rejects)
    assert [group.messages[0][1] for group in loaded.groups] == ["p", "r"] and rejects.counts == {"not_utf8": 1}
    assert json.loads(rejects.file.getvalue())["line"] == 2 and loaded.unknown_keys == {"when": 2}
    with pytest.raises(UserError, match=r"in\.parquet:2: not UTF-8"):
        load_groups([str(tmp_path / "in.parquet")], Rejects("stop"))


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    columns = ["prompt", "source", "response", "reward", "reward"]
    table = pa.table([["p"], ["a"], ["r"], [0.0], [1.0]], names=columns)
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(UserError, match="column 'reward' is there twice"):
        load_groups([str(tmp_path / "in.parquet")], Rejects("stop"))


@pytest.mark.parametrize("pattern", ["x.jsonl", "*.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "link to nothing"])
def test_a_file_that_is_none_is_refused_at_once(tmp_path, kind, pattern):
    os.mkfifo(tmp_path / "x.jsonl") if kind == "pipe" else (tmp_path / "x.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"x\.jsonl is no regular file"):
        load_groups([str(tmp_path / pattern)], Rejects("stop"))
