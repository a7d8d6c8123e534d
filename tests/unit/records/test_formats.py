"""Public formats read as records; every row is written by hand in the public structure."""

import json

import pyarrow
import pytest

from fuserl_megatron.records.format_reader import FormatReader, check_format
from fuserl_megatron.records.formats import FORMATS
from fuserl_megatron.records.grouping import load_groups
from fuserl_megatron.records.messages import BadRecord
from fuserl_megatron.records.records import Rejects
from fuserl_megatron.util.errors import UserError

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be short."}
CASES = {
    "records": (
        {"prompt": "2+2?", "model": "a", "response": "4", "score": 0.5, "meta": {}},
        [{"prompt": "2+2?", "model": "a", "response": "4", "score": 0.5, "meta": {}, "source": "a", "reward": 0.5}],
    ),
    "messages": (
        {"messages": [SYSTEM, USER, FOUR], "model": "a", "reward": 1},
        [{"prompt": [SYSTEM, USER], "response": "4", "source": "a", "reward": 1}],
    ),
    "sharegpt": (
        {
            "system": "Be short.",
            "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
            "score": 3,
        },
        [{"prompt": [SYSTEM, USER], "response": "4", "source": "file", "reward": 3}],
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2+2", "output": "4", "history": [["Hi", "Hello"]], "score": 3},
        [
            {
                "prompt": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello"},
                    {"role": "user", "content": "Add.\n2+2"},
                ],
                "response": "4",
                "source": "file",
                "reward": 3,
            }
        ],
    ),
    "prompt_completion": (
        {"prompt": [USER], "completion": [FOUR], "model": "a", "reward": 2},
        [{"prompt": [USER], "response": "4", "source": "a", "reward": 2}],
    ),
    "preference": (
        {
            "prompt": "2+2?",
            "chosen": [USER, FOUR],
            "rejected": [USER, FIVE],
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        },
        [
            {"prompt": [USER], "response": "4", "source": "file", "reward": 8.5},
            {"prompt": [USER], "response": "5", "source": "file", "reward": 2.0},
        ],
    ),
    "nemo_rl": (
        {"context": [USER], "completions": [{"rank": 0, "completion": [FOUR]}, {"rank": 1, "completion": [FIVE]}]},
        [
            {"prompt": [USER], "response": "4", "source": "file", "reward": 0.0},
            {"prompt": [USER], "response": "5", "source": "file", "reward": -1.0},
        ],
    ),
    "ultrafeedback": (
        {
            "source": "evol_instruct",
            "instruction": "2+2?",
            "completions": [
                {"model": "llama", "response": "4", "overall_score": 8.5},
                {"model": "gpt", "response": "5", "overall_score": 2.0},
            ],
        },
        [
            {"prompt": "2+2?", "response": "4", "source": "llama", "reward": 8.5},
            {"prompt": "2+2?", "response": "5", "source": "gpt", "reward": 2.0},
        ],
    ),
    "responses": (
        {"prompt": "2+2?", "responses": ["4", "5"], "rewards": [1, 0], "models": ["a", "b"]},
        [
            {"prompt": "2+2?", "response": "4", "source": "a", "reward": 1},
            {"prompt": "2+2?", "response": "5", "source": "b", "reward": 0},
        ],
    ),
}


def read(row, format="auto", **fields):
    return list(FormatReader("data/file.jsonl.gz", format, fields).records(("file.jsonl", 1), row))


@pytest.mark.parametrize("format", ["auto", "named"])
@pytest.mark.parametrize("name", CASES)
def test_a_row_of_each_format(name, format):
    row, expected = CASES[name]
    assert read(row, name if format == "named" else "auto") == expected


def test_every_format_has_a_case():
    assert set(CASES) == set(FORMATS)


def test_pairs_without_scores_and_with_text():
    found = read({"prompt": "2+2?", "chosen": "4", "rejected": "5", "chosen_model": "a"})
    assert [(r["response"], r["reward"], r["source"]) for r in found] == [("4", 1.0, "a"), ("5", 0.0, "file")]


def test_an_explicit_prompt_beside_the_answers_alone():
    found = read({"prompt": [SYSTEM, USER], "chosen": [FOUR], "rejected": [FIVE]})
    assert [r["prompt"] for r in found] == [[SYSTEM, USER]] * 2


def test_responses_as_objects():
    row = {"prompt": "2+2?", "responses": [{"text": "4", "generator": "a", "rating": 1}]}
    assert read(row) == [{"prompt": "2+2?", "response": "4", "source": "a", "reward": 1}]


def test_lists_in_a_column_of_a_csv_file_are_json():
    assert read({"prompt": "2+2?", "responses": '["4"]', "rewards": "[1]"})[0]["response"] == "4"


def test_fields_of_other_names():
    row = {"question": "2+2?", "answer": {"text": "4"}, "scores": [{"overall": 3}]}
    found = read(row, prompt="question", response="answer.text", reward="scores.0.overall", source="=llama")
    assert {k: found[0][k] for k in ("prompt", "response", "reward", "source")} == {
        "prompt": "2+2?",
        "response": "4",
        "reward": 3,
        "source": "llama",
    }


def test_a_given_reward_stands_in_every_record():
    row = {"messages": [USER, FOUR]}
    assert read(row, reward="=0")[0]["reward"] == 0
    with pytest.raises(BadRecord, match="there is no reward: name its field"):
        read(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "2+2?"}, r"fits no format; nearly: ultrafeedback .*alpaca"),
        ({"conversations": [{"role": "user"}]}, "no row of format sharegpt: conversations.0. has no 'from'"),
        ({"messages": [USER]}, "no row of format messages: messages does not end with the assistant's message"),
        ({"messages": [FOUR], "reward": 1}, "after at least one other"),
        ({"prompt": "x", "responses": ["4", "5"], "rewards": [1]}, "rewards has 1 entries for 2 responses"),
        ({"prompt": "x", "responses": [{"score": 1}]}, "responses.0. has no 'response'"),
        ({"chosen": "4", "rejected": "5"}, "chosen is text, and there is no 'prompt'"),
        ({"context": "x", "completions": [{"completion": [FOUR]}]}, "completions.0. has no 'rank'"),
        ({"instruction": 3, "output": "4", "reward": 1}, "instruction is int 3, not text"),
    ],
)
def test_what_is_wrong_is_said(row, message):
    with pytest.raises(BadRecord, match=message):
        read(row)


def test_the_next_row_must_be_of_the_same_format():
    reader = FormatReader("f.jsonl")
    assert list(reader.records(("f", 1), CASES["alpaca"][0]))
    with pytest.raises(BadRecord, match="a row of format alpaca needs 'instruction', 'output'"):
        list(reader.records(("f", 2), CASES["messages"][0]))


def test_a_wrong_path_names_the_nearest():
    with pytest.raises(BadRecord, match=r"fields.reward=scors: there is no 'scors' in this row. Did you mean scores"):
        read({"messages": [USER, FOUR], "scores": 1}, reward="scors")


def test_settings():
    with pytest.raises(UserError, match="format=sharegtp: not one of .* Did you mean sharegpt"):
        check_format("sharegtp", {})
    with pytest.raises(UserError, match="fields.reward=: must be a path of keys"):
        check_format("auto", {"reward": ""})


ROWS = [{"prompt": "2+2?", "model": name, "response": text, "score": 0.5} for name, text in (("a", "4"), ("b", "5"))]


def as_stream(path):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def as_file(path):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("list.json", lambda path: path.write_text(json.dumps(ROWS, indent=1))),
        ("lines.json", lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))),
        ("stream.arrow", as_stream),
        ("file.arrow", as_file),
        ("a.csv", lambda path: path.write_text("prompt,model,response,score\n2+2?,a,4,0.5\n2+2?,b,5,0.5\n")),
        ("folder", lambda path: (path.mkdir(), (path / "x.json").write_text(json.dumps(ROWS)))),
    ],
)
def test_kinds_of_files(tmp_path, name, write):
    write(tmp_path / name)
    loaded = load_groups([str(tmp_path / name)], Rejects("stop"))
    assert loaded.sources == ["a", "b"] and loaded.inputs[0]["format"] == "records"
    assert {text: reward for (_, text), (reward, _) in loaded.groups[0].responses.items()} == {"4": 0.5, "5": 0.5}


@pytest.mark.parametrize("name", ["cut.json", "cut.arrow", "ragged.csv"])
def test_files_that_are_broken(tmp_path, name):
    (tmp_path / name).write_text('[{"prompt": 1' if name == "cut.json" else "prompt,response\n1\n")
    fields = {"source": "=a", "reward": "=0"}
    with pytest.raises(UserError, match=rf"{name}: not a (readable (Arrow|CSV) file|JSON list)"):
        load_groups([str(tmp_path / name)], Rejects("stop"), fields=fields)


@pytest.mark.parametrize(("rule", "expected"), [("first", 1.0), ("max", 4.0), ("mean", 2.0)])
def test_a_response_that_comes_again(tmp_path, rule, expected):
    rows = [{"prompt": "x", "source": "a", "response": "y", "reward": reward} for reward in (1.0, 4.0, 1.0)]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    loaded = load_groups([str(tmp_path / "in.json")], Rejects("stop"), on_repeated=rule)
    assert [reward for reward, _ in loaded.groups[0].responses.values()] == [pytest.approx(expected)]
    assert loaded.counts["duplicates"] == 2


def test_a_bad_record_of_a_row_leaves_the_others(tmp_path):
    row = {"prompt": "x", "responses": ["a", "", "b"], "rewards": [1, 2, 3], "sources": ["s", "s", "s"]}
    (tmp_path / "in.json").write_text(json.dumps([row]))
    rejects = Rejects("skip")
    loaded = load_groups([str(tmp_path / "in.json")], rejects)
    assert [text for _, text in loaded.groups[0].responses] == ["a", "b"] and sum(rejects.counts.values()) == 1
    assert loaded.counts["records"] == 3
