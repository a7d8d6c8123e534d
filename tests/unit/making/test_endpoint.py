"""How many requests an address gets: more while that brings more tokens, half when it has too much to do."""

import pytest

from fuserl_megatron.making import endpoint
from fuserl_megatron.making.endpoint import Endpoint
from fuserl_megatron.making.faults import fault_of_status, message_of, retry_after


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    moment = [100.0]
    monkeypatch.setattr(endpoint.time, "monotonic", lambda: moment[0])
    return moment


def run(address, clock, periods, capacity):
    """Answers of one token come at a rate that grows with what is in flight, up to the capacity."""
    limits = []
    for _ in range(periods):
        address.in_flight = address.limit
        rate = min(address.limit, capacity)
        for _ in range(2 * rate):
            address.answered(1)
        clock[0] += 2.0
        while address._answers < address.limit:  # a period has at least as many answers as requests in flight
            for _ in range(rate):
                address.answered(1)
            clock[0] += 1.0
        address.adapt(clock[0])
        limits.append(address.limit)
    return limits


def test_it_rises_to_the_servers_capacity_and_little_beyond(clock):
    limits = run(Endpoint("http://h/v1", 1000, {}), clock, 12, capacity=300)
    assert limits == sorted(limits) and 300 <= limits[-1] <= 2.25 * 300
    assert run(Endpoint("http://h/v1", 100, {}), clock, 12, capacity=300)[-1] == 100
    assert run(Endpoint("http://h/v1", 1000, {}), clock, 5, capacity=20)[-1] <= 96


def test_it_does_not_rise_on_what_was_not_used(clock):
    address = Endpoint("http://h/v1", 1000, {})
    address.in_flight = 3
    for _ in range(200):
        address.answered(1)
    clock[0] += 5.0
    assert not address.adapt(clock[0]) and address.limit == 64


def test_refusals_halve_it_once_for_all_and_pause_it(clock):
    address = Endpoint("http://h/v1", 1000, {})
    for _ in range(30):
        address.busy(None)
    assert address.limit == 32 and not address.is_open(clock[0])
    clock[0] += 2.0
    assert address.is_open(clock[0])
    address.busy(40.0)
    assert address.limit == 16 and not address.is_open(clock[0] + 39) and address.is_open(clock[0] + 40)
    clock[0] += 41
    limits = run(address, clock, 6, capacity=300)
    assert limits[-1] > 16 and max(b - a for a, b in zip(limits, limits[1:], strict=False)) <= 4, "carefully, now"


def test_what_a_status_means():
    assert [fault_of_status(status, {}, b"").kind for status in (400, 401, 404, 408, 422, 429, 500, 502, 503)] == [
        "permanent",
        "stop",
        "permanent",
        "broken",
        "permanent",
        "busy",
        "broken",
        "broken",
        "busy",
    ]
    vllm = b'{"error": {"message": "This model\'s maximum context length is 10 tokens", "param": "input_tokens"}}'
    assert fault_of_status(400, {}, vllm).name == "prompt_too_long"
    assert fault_of_status(429, {"Retry-After": "7"}, b"").wait == 7.0


def test_the_servers_own_words_on_one_line():
    assert message_of(b'{"error": {"message": "a\\nb"}}') == "a b"
    assert message_of(b'{"detail": "a"}') == message_of(b'"a"') == message_of(b"<html><b>a</b></html>") == "a"
    assert message_of(b"") == "(no text)" and message_of(b"\xff\xfe") and len(message_of(b"x" * 9000)) == 300
    assert message_of(b'{"error": ["a"]}') == '["a"]'


def test_retry_after():
    assert [retry_after(text) for text in (None, "", "3", "1.5", "-1", "nan", "soon")] == [
        None,
        None,
        3.0,
        1.5,
        0.0,
        None,
        None,
    ]
    assert retry_after("1e9") == 600.0 and retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
