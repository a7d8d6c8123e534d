"""`fuserl sample` in process against a server that answers at once: what is sent, kept, tried again, and refused."""

import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from aiohttp import web

from fuserl_megatron.config.sample_sections import SamplingConfig
from fuserl_megatron.making import client, endpoint, preflight
from fuserl_megatron.making.finished import finished_rows
from fuserl_megatron.making.sample import sample
from fuserl_megatron.making.sample_plan import dry_run, status
from fuserl_megatron.util.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client, "BACK_OFF_S", 0.01)
    monkeypatch.setattr(preflight, "PAUSE_S", 0.01)
    monkeypatch.setattr(client, "TICK_S", 0.02)
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(endpoint, "POLL_S", 0.05)
    monkeypatch.setattr(endpoint, "FRESH_S", 0.02)


def rows_of(config, name="a"):
    return list(finished_rows(Path(config.output) / name))


def content_of(rows):
    """What must not depend on order, time or faults."""
    own = ("key", "prompt", "source", "index", "response", "finish_reason", "seed", "meta")
    texts = sorted(json.dumps({name: row[name] for name in own}) for row in rows)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def refused(config, source, match):
    with pytest.raises(UserError, match=match) as caught:
        sample(config, [source])
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


def test_faults_change_nothing_in_what_is_kept(settings, stub):
    config, source = settings(100, n=2)
    sample(config, [source])
    expected = content_of(rows_of(config))
    stub.share = 0.3
    other, _ = settings(100, n=2, output=config.output + "2", max_attempts=50)
    sample(other, [source])
    assert content_of(rows_of(other)) == expected
    faults = json.loads((Path(other.output) / "a" / "done.json").read_text())["faults"]
    assert {"http_429", "http_500", "http_503", "connection", "not_json"} <= set(faults), faults


def test_a_busy_server_takes_no_attempt_and_gets_less(settings, stub):
    refusals = iter(range(200))

    def busy(body):
        if stub.in_flight > 4 and next(refusals, None) is not None:
            return web.json_response({"error": "busy"}, status=429)

    stub.script, stub.delay = busy, 0.005
    config, source = settings(60, n=2, max_attempts=1, max_failures=0.0)
    sample(config, [source])
    assert {row["attempt"] for row in rows_of(config)} == {1}
    done = json.loads((Path(config.output) / "a" / "done.json").read_text())
    assert done["max_in_flight_reached"] < 64 and done["faults"]["http_429"] > 4


def test_a_dead_engine_is_waited_for_and_takes_no_attempt(settings, stub, capsys):
    """What vLLM does when its engine dies: 500 on everything, /health 503."""
    died = threading.Event()

    def dead(body):
        if stub.counts["answers"] == 30 and not died.is_set():
            died.set()
            stub.healthy = False
            threading.Timer(0.3, lambda: setattr(stub, "healthy", True)).start()
        return None if stub.healthy else web.json_response({"error": {"message": "EngineCore died"}}, status=500)

    stub.script = dead
    config, source = settings(60, n=1, max_failures=0.0, max_attempts=2)
    sample(config, [source])
    assert {row["attempt"] for row in rows_of(config)} == {1} and len(rows_of(config)) == 60
    out = capsys.readouterr().out
    assert out.count("does not answer (HTTP 500: EngineCore died); waiting for it") == 1
    assert out.count("answers again") == 1


def test_a_server_that_stays_away_ends_the_run_and_the_next_goes_on(settings, stub):
    def away(body):
        stub.healthy = stub.counts["answers"] < 30
        return None if stub.healthy else web.json_response({"error": {"message": "gone"}}, status=500)

    stub.script = away
    config, source = settings(60, n=1, patience=0.3)
    refused(config, source, r"a: no answer for 0.3 s \(patience\): .*gone")
    assert not (Path(config.output) / "a" / "done.json").exists()
    stub.script, stub.healthy = None, True
    stub.counts.clear()
    sample(config, [source])
    assert stub.counts["answers"] <= 32 and len(rows_of(config)) == 60


def test_permanent_failures_are_noted_and_asked_again_on_request(settings, stub):
    def too_long(body):
        if body["messages"][-1]["content"] == "question 3":
            text = "maximum context length is 10 tokens"
            return web.json_response({"error": {"message": text}}, status=400)

    stub.script = too_long
    config, source = settings(10, n=2)
    assert sample(config, [source]) == 0
    assert len(rows_of(config)) == 18
    failures = [json.loads(line) for line in (Path(config.output) / "a" / "failures.jsonl").read_text().splitlines()]
    assert [(f["kind"], f["status"], f["attempts"]) for f in failures] == [("prompt_too_long", 400, 1)] * 2
    stub.counts.clear()
    sample(config, [source])
    assert not stub.counts
    stub.script = None
    again, _ = settings(10, n=2, retry_failed=True)
    sample(again, [source])
    assert len(rows_of(config)) == 20


def test_a_million_that_all_fail_alike_stop_after_twenty(settings, stub):
    stub.script = lambda body: (
        web.json_response({"error": {"message": f"bad adapter, request {time.time_ns()}"}}, status=400)
        if body["max_tokens"] == 100
        else None
    )
    config, source = settings(1000, n=1)
    refused(config, source, "the first 20 requests all failed alike: HTTP 400: bad adapter")
    config, source = settings(5, n=1)
    refused(config, source, "no request brought an answer: HTTP 400: bad adapter")


def test_too_many_failures_stop(settings, stub):
    stub.script = lambda body: (
        web.json_response({"error": {"message": "odd"}}, status=400)
        if body["max_tokens"] == 100 and int(body["messages"][-1]["content"].split()[1]) % 2
        else None
    )
    config, source = settings(1000, n=1)
    refused(
        config, source, "11 answers failed .11 http_400., more than max_failures=0.01 allows; the last: HTTP 400: odd"
    )


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
    warned = capsys.readouterr().out.count("the answers to each of 20 prompts are the same")
    assert warned == (0 if obeys else 1)


def test_more_than_one_choice_is_refused(settings, stub):
    choice = {"message": {"content": "x"}, "finish_reason": "stop"}
    stub.script = lambda body: web.json_response({"choices": [choice, choice]})
    config, source = settings(5, n=1)
    refused(config, source, "2 choices where one was asked for")


def test_an_answer_that_the_server_gave_up_is_asked_for_again(settings, stub):
    """What vLLM says of what is under way when it is told to end: status 200, the beginning of an answer."""
    given_up = {"choices": [{"message": {"content": "half"}, "finish_reason": "abort"}]}
    first = iter(range(5))

    def gives_up(body):
        if body["max_completion_tokens"] == 100 and next(first, None) is not None:
            return web.json_response(given_up)

    stub.script = gives_up
    config, source = settings(10, n=1, source={"max_tokens_field": "max_completion_tokens"})
    sample(config, [source])
    rows = rows_of(config)
    assert len(rows) == 10 and {row["finish_reason"] for row in rows} <= {"stop", "length"}


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


def test_a_signal_drains_and_leaves_the_way_on(settings, stub, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fuserl", "sample", "n=1"])
    stub.delay = 0.05
    config, source = settings(400, n=1, source={"max_in_flight": 16})

    def told(body):
        if stub.counts["answers"] == 60:
            stub.counts["answers"] += 1
            os.kill(os.getpid(), signal.SIGTERM)

    stub.script = told
    assert sample(config, [source]) == 0
    directory = Path(config.output)
    assert "continue with: cd " in capsys.readouterr().out
    assert (directory / "REQUEUE").read_text().splitlines()[1].endswith("fuserl sample n=1")
    assert not (directory / "a" / "done.json").exists()
    kept = len((directory / "a" / "part-00000.jsonl").read_bytes().splitlines())
    assert 60 <= kept < 200 and stub.in_flight == 0
    assert status(config.output) == 1
    assert f"a: {kept}/400 answers" in capsys.readouterr().out
    stub.script, stub.delay = None, 0.0
    stub.counts.clear()
    sample(config, [source])
    assert stub.counts["answers"] == 400 - kept + 1 and not (directory / "REQUEUE").exists()
    assert status(config.output) == 0


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


def test_one_source_that_fails_does_not_keep_the_other_from_going_on(settings, stub):
    from dataclasses import replace

    stub.script = lambda body: (
        web.json_response({"error": {"message": "odd"}}, status=400)
        if body["temperature"] == 0.5 and body["max_tokens"] == 100
        else None
    )
    config, source = settings(40, n=1)
    other = replace(source, name="b", sampling=SamplingConfig(temperature=0.5, max_tokens=100))
    with pytest.raises(UserError, match="b: the first 20"):
        sample(config, [other, source])
    assert len(rows_of(config)) == 40 and not (Path(config.output) / "b" / "done.json").exists()
