"""Prompts by their hash: duplicates, what is left out, a second reading of what is wanted."""

import json

import numpy as np
import pytest

from fuserl_megatron.making.prompts import PromptList
from fuserl_megatron.util.errors import UserError

ROWS = [
    {"prompt": "one", "meta": {"id": 1}},
    {"prompt": [{"role": "user", "content": "one"}]},  # the same prompt
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "two, longer"}], "id": 3},
    {"prompt": "three"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_duplicates_are_one_prompt_and_only_what_is_wanted_is_read_again(tmp_path):
    file = write(tmp_path / "p.jsonl", ROWS)
    prompts = PromptList([file])
    assert len(prompts) == 3
    assert prompts.counts == {"rows": 4, "duplicates": 1, "ignored_id": 1}
    assert prompts.longest[0].given == ROWS[2]["prompt"]
    assert prompts.num_characters == len("one") + len("s") + len("two, longer") + len("three")
    read = list(prompts.read(np.array([True, False, True])))
    assert [(p.number, p.given, p.meta) for p in read] == [(0, "one", {"id": 1}), (2, "three", None)]
    assert list(prompts.read(np.ones(3, bool)))[1].messages[0] == ("system", "s")
    assert prompts.counts["ignored_id"] == 1


def test_the_name_of_a_prompt_does_not_depend_on_its_place(tmp_path):
    one = PromptList([write(tmp_path / "a.jsonl", ROWS)])
    two = PromptList([write(tmp_path / "b.jsonl", ROWS[::-1])])
    assert set(one.ids.tolist()) == set(two.ids.tolist())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"p.jsonl:5: field 'prompt' is missing \(there is: text\)"),
        ({"prompt": " "}, "p.jsonl:5: field 'prompt' is empty"),
        ({"prompt": "x", "tools": [{}]}, "p.jsonl:5: field 'tools'"),
        ({"prompt": "x", "meta": {"a": float("nan")}}, "p.jsonl:5: field 'meta'"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "ends with an assistant"),
        ({"prompt": "not here"}, "p.jsonl:5: cannot be asked"),
    ],
)
def test_a_bad_prompt_stops_with_its_place_or_is_left_out(tmp_path, row, message):
    file = write(tmp_path / "p.jsonl", [*ROWS, row])
    refuse = lambda prompt: "cannot be asked" if prompt.given == "not here" else None  # noqa: E731
    with pytest.raises(UserError, match=message) as caught:
        PromptList([file], refuse=refuse)
    assert "\n" not in str(caught.value)
    prompts = PromptList([file], on_bad_record="skip", refuse=refuse)
    assert len(prompts) == 3 and prompts.counts["skipped"] == 1
    assert len(list(prompts.read(np.ones(3, bool)))) == 3


def test_a_file_that_changes_under_way_stops(tmp_path):
    file = tmp_path / "p.jsonl"
    prompts = PromptList([write(file, ROWS)])
    write(file, [ROWS[0], {"prompt": "other"}, *ROWS[2:]])
    assert len(list(prompts.read(np.ones(3, bool)))) == 3  # the row was a duplicate
    write(file, [*ROWS[:3], {"prompt": "other"}])
    with pytest.raises(UserError, match="p.jsonl:4: changed"):
        list(prompts.read(np.ones(3, bool)))


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = str(tmp_path / "p.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "meta": {"k": 1}}, {"prompt": "b"}]), file)
    assert [(p.given, p.meta) for p in PromptList([file]).read(np.ones(2, bool))] == [("a", {"k": 1}), ("b", None)]
    other = str(tmp_path / "o.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}]), other)
    with pytest.raises(UserError, match="column 'prompt' is missing"):
        PromptList([other])
    with pytest.raises(UserError, match="prompts: .* does not exist"):
        PromptList([str(tmp_path / "n.jsonl")])
