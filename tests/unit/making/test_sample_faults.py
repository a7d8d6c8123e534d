"""`fuserl sample` in process against a server that goes wrong: waited for, tried again, given up, or stopped."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from aiohttp import web
from sampling_case import content_of, quick, refused, rows_of  # noqa: F401

from fuserl_megatron.config.sample_sections import SamplingConfig
from fuserl_megatron.making.sample import sample
from fuserl_megatron.making.sample_plan import status
from fuserl_megatron.util.errors import UserError


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
