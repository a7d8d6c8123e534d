"""The ready-made rules: what is right, what is wrong, what is a mistake in the record."""

import pytest

from fuserl_megatron.making import builtin_rules as rules


def record(answer):
    return {"meta": {"answer": answer}}


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("The total is 1,234.50 dollars.", "1234.5", 1),
        ("So x = 7. The answer is \\boxed{\\frac{1}{2}}... no: \\boxed{12}", 12, 1),
        ("3 + 4 = 7\n#### 7", "#### 7", 1),
        ("It is 12%", 0.12, 1),
        ("about 3/4", "0.75", 1),
        ("I got 41, or was it 42?", 41, 0),
        ("**Answer:** 5\nThere were 3 cats.", 5, 1),
        ("1e3", 1000, 1),
        ("\u22125", -5, 1),
        ("no number", 5, 0),
        ("1/0", 5, 0),
    ],
)
def test_numeric(response, answer, right):
    assert rules.numeric("", response, record(answer)) == right


def test_numeric_refuses_a_record_without_a_number():
    with pytest.raises(ValueError, match="meta.answer holds no number"):
        rules.numeric("", "5", record("five"))
    with pytest.raises(KeyError, match="no meta.gold"):
        rules.numeric("", "5", record(5), field="meta.gold")


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (" Paris. ", "paris", 1),
        ("The answer is **Paris**.", "Paris", 1),
        ("\\boxed{Paris}", ["London", "PARIS"], 1),
        ("Paris or London", "Paris", 0),
        ("\u201cx\u201d", "x", 1),
        ("3.5.", "3.5", 1),
        ("x y", "x", 0),
    ],
)
def test_exact(response, answer, right):
    assert rules.exact("", response, record(answer)) == right


def test_matches_and_json():
    assert rules.matches("", "<think>\na</think>\nb", {}, r"<think>.*</think>.+") == 1
    assert rules.matches("", "x <think>a</think>b", {}, r"<think>.*</think>.+") == 0
    assert rules.matches("", "x yes y", {}, "yes", whole=False) == 1
    assert rules.is_json("", '{"a": 1}', {}, ["a"]) == 1 and rules.is_json("", '{"a": 1}', {}, ["b"]) == 0
    assert rules.is_json("", 'Here:\n```json\n{"a": 1}\n```', {}, ["a"]) == 1
    assert (
        rules.is_json("", "[1]", {}) == 1
        and rules.is_json("", "[1", {}) == 0
        and rules.is_json("", "[1]", {}, ["a"]) == 0
    )


def test_keywords_and_length():
    assert rules.keywords("", "Red and blue", {}, ["red", "green"]) == 0.5
    assert rules.keywords("", "Redder", {}, ["red"]) == 0
    assert rules.keywords("", "Red", {}, ["red"], forbidden=["RED"]) == 0
    assert rules.keywords("", "a b", {"meta": '{"words": ["a", "b"]}'}, field="meta.words") == 1
    assert rules.length("", "w " * 200, {}) == -2
    assert rules.length("", "w " * 200, {}, target=150, slope=2) == -1
    assert rules.length("", "w " * 2000, {}, cap=100) == -1
    assert rules.length("", "abc", {}, unit="characters", slope=-100) == 3


def test_number():
    assert (
        rules.number("", "r", {"reward": 3}) == 3 and rules.number("", "r", record("2.5"), field="meta.answer") == 2.5
    )


def test_math_verify():
    pytest.importorskip("math_verify")
    assert rules.math_verify("", "so $x = \\frac{2}{4}$", record("\\frac{1}{2}")) == 1
    assert rules.math_verify("", "so $x = 0.6$", record("$\\frac{1}{2}$")) == 0


def test_if_verifiable():
    pytest.importorskip("if_verifiable")
    meta = {"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"]}
    meta["kwargs"] = [{}, {"relation": "at least", "num_words": 3}]
    found = rules.if_verifiable("p", "one, two three", {"meta": meta})
    assert found["reward"] == found["partial_strict"] == 0.5 and found["binary_strict"] == 0
    with pytest.raises(ValueError, match="ifeval has no instruction nonsense"):
        rules.if_verifiable("p", "r", {"meta": meta | {"instruction_id_list": ["nonsense"]}})
