"""`fuserl sample` in process against a server that answers at once: what is sent, kept and asked for again."""

from pathlib import Path

import pytest
from aiohttp import web
from sampling_case import content_of, quick, refused, rows_of  # noqa: F401

from fuserl_megatron.config.sample_sections import SamplingConfig
from fuserl_megatron.making.sample import sample
from fuserl_megatron.making.sample_plan import dry_run
from fuserl_megatron.util.errors import UserError


def test_every_answer_once_in_the_order_of_the_prompts(settings, stub, capsys):
    config, source = settings(20, n=3)
    assert sample(config, [source]) == 0
    rows = rows_of(config)
    assert [(row["prompt"], row["index"]) for row in rows] == [
        (f"question {i}", k) for i in range(20) for k in range(3)
    ]
    assert len({row["key"] for row in rows}) == len({row["seed"] for row in rows}) == 60
    assert len(stub.seen) == stub.seen.total() == 61  # with the probe of the preflight
    row = rows[7]
    assert row["meta"] == {"i": 2} and row["source"] == "a" and row["model"] == "m" and row["server"] == stub.url
    assert row["tokens"] == 20 and row["attempt"] == 1 and row["time"] and row["seconds"] >= 0
    assert row["finish_reason"] in ("stop", "length")
    out = capsys.readouterr().out
    assert "100.0%" in out and "report.html" in out
    assert "<svg" in (Path(config.output) / "report.html").read_text()


def test_what_is_sent(settings, stub):
    bodies = []
    stub.script = lambda body: bodies.append(body)
    more = {"system": "be brief", "chat_template_kwargs": {"enable_thinking": False}}
    config, source = settings(1, n=1, source=more, sampling={"stop": ("END",), "top_k": 5, "extra_body": {"x": 1}})
    sample(config, [source])
    body = bodies[-1]
    assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "question 0"}]
    assert body == {
        "model": "m",
        "temperature": 0.8,
        "top_p": 0.95,
        "max_tokens": 100,
        "stop": ["END"],
        "top_k": 5,
        "x": 1,
        "chat_template_kwargs": {"enable_thinking": False},
        "messages": body["messages"],
        "seed": rows_of(config)[0]["seed"],
    }
    assert "n" not in body and 0 <= body["seed"] < 2**31


def test_growing_asks_only_for_what_is_missing(settings, stub, capsys):
    config, source = settings(10, n=2)
    sample(config, [source])
    before = {row["key"]: row for row in rows_of(config)}
    grown, _ = settings(15, n=3)
    stub.counts.clear()
    sample(grown, [source])
    assert stub.counts["answers"] == 15 * 3 - 10 * 2 + 1  # and the probe
    after = {row["key"]: row for row in rows_of(grown)}
    assert len(after) == 45 and before.items() <= after.items()
    stub.counts.clear()
    assert sample(grown, [source]) == 0 and not stub.counts
    assert "complete, 45 answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"sampling": SamplingConfig(max_tokens=100, temperature=0.7)}, "sampling.temperature 0.8 there, 0.7 here"),
        ({"system": "s"}, "system null there, s here"),
        ({"model": "m2"}, "model m there, m2 here"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs.a null there, 1 here"),
        ({"reasoning": "keep"}, "reasoning apart there, keep here"),
        ({"max_in_flight": 3, "timeout": 10.0, "price_input": 1.0}, None),
    ],
)
def test_what_may_change_between_two_runs(settings, stub, change, difference):
    stub.models = None
    config, source = settings(3, n=1)
    sample(config, [source])
    grown, other = settings(4, n=1, source=change)
    if difference:
        refused(grown, other, difference)
    else:
        sample(grown, [other])
        assert len(rows_of(grown)) == 4


@pytest.mark.parametrize(
    ("message", "answer", "reasoning"),
    [
        ({"content": "4", "reasoning_content": "hm"}, "4", "hm"),
        ({"content": "4", "reasoning": "hm"}, "4", "hm"),
        ({"content": "<think>\nhm\n</think>\n\n4"}, "4", "hm"),
        ({"content": "hm</think>4"}, "4", "hm"),
        ({"content": "<think>cut here"}, "", "cut here"),
        ({"content": "a <think> b </think>"}, "a <think> b </think>", None),
        ({"content": None, "reasoning_content": "all of it"}, "", "all of it"),
    ],
)
def test_reasoning_is_kept_apart(settings, stub, message, answer, reasoning):
    stub.script = lambda body: web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})
    config, source = settings(1, n=1)
    sample(config, [source])
    (row,) = rows_of(config)
    assert (row["response"], row.get("reasoning")) == (answer, reasoning)
    assert row["tokens"] is None


@pytest.mark.parametrize("obeys", [True, False])
def test_a_server_that_does_not_sample_is_pointed_out(settings, stub, capsys, obeys):
    def answer(body):
        text = f"{body['messages'][-1]['content']} {body['seed'] if obeys else ''}"
        return web.json_response({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

    stub.script = answer
    config, source = settings(40, n=3)
    sample(config, [source])
    out = capsys.readouterr().out
    assert out.count("the answers to each of 20 prompts are the same") == (0 if obeys else 1)
    assert ("66.7% of the answers repeat another one to their prompt" in out) == (not obeys)


def test_completion_with_demonstrations_keeps_the_plain_prompt(settings, stub, tmp_path):
    shown = tmp_path / "shown.jsonl"
    shown.write_text('{"prompt": "1+1?", "response": "2"}\n{"prompt": "2+2?", "response": "4"}\n')
    bodies = []
    stub.script = lambda body: bodies.append(body)
    config, source = settings(1, n=1, source={"kind": "completion", "demonstrations": str(shown)})
    sample(config, [source])
    assert bodies[-1]["prompt"] == (
        "Question: 1+1?\nAnswer: 2\n\nQuestion: 2+2?\nAnswer: 4\n\nQuestion: question 0\nAnswer:"
    )
    (row,) = rows_of(config)
    assert row["prompt"] == "question 0" and row["response"] == row["response"].strip()
    shown.write_text('{"prompt": "1+1?", "response": "3"}\n')
    refused(config, source, "demonstrations")
    shown.write_text('{"prompt": "1+1?"}\n')
    refused(config, source, "shown.jsonl:1: field 'response' is missing")


def test_several_addresses_share_the_work(settings, stub):
    from stub_server import Stub

    with Stub(seed=2).running() as second:
        stub.delay = second.delay = 0.01
        config, source = settings(200, n=1, source={"url": (stub.url, second.url), "max_in_flight": 8})
        sample(config, [source])
        assert min(stub.counts["answers"], second.counts["answers"]) > 30
        assert {row["server"] for row in rows_of(config)} == {stub.url, second.url}


def test_dry_run_counts_and_writes_nothing(settings, stub, capsys):
    config, source = settings(10, n=2, source={"price_input": 1.0, "price_output": 2e4})
    assert dry_run(config, [source]) == 0
    out = capsys.readouterr().out
    assert "prompts: 10 of 10 rows" in out and "<= 2,000" in out and "<= 40.00" in out
    assert not Path(config.output).exists()
    sample(config, [source])
    grown, _ = settings(10, n=4)
    capsys.readouterr()
    assert dry_run(grown, [source]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("a "))
    assert row.split()[1:5] == ["40", "20", "20", "400"]
    stub.models = ["other"]
    with pytest.raises(UserError, match="model=m"):
        dry_run(grown, [source])


@pytest.mark.parametrize(("action", "answers"), [("count", 10), ("drop", 8)])
def test_prompts_that_a_test_set_has(settings, stub, prompts, capsys, action, answers):
    test_set = prompts(2, "test.jsonl")
    config, source = settings(10, n=1, heldout=(test_set,), heldout_action=action)
    sample(config, [source])
    assert len(rows_of(config)) == answers
    assert "prompts: 2 overlap with held-out ones" in capsys.readouterr().out


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(settings, stub, monkeypatch):
    key = "k-1234567890abcdef"
    monkeypatch.setenv("MY_SERVICE", key)
    stub.script = lambda body: (
        web.json_response({"error": {"message": f"key {key} has no rights"}}, status=400)
        if "question 3" in str(body["messages"])
        else None
    )
    config, source = settings(10, n=1, source={"api_key_env": "MY_SERVICE"})
    sample(config, [source])
    for file in Path(config.output).rglob("*"):
        assert not file.is_file() or key not in file.read_text(errors="replace"), file
    monkeypatch.delenv("MY_SERVICE")
    refused(config, source, "api_key_env=MY_SERVICE: not set in the environment")
