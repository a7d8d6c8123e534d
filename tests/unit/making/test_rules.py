"""A rule that misbehaves costs its row and not the run."""

import os
import signal
import subprocess
import sys
import time

import pytest
from making_helpers import sample

from fuserl_megatron.config.score_sections import RuleReward
from fuserl_megatron.making.rules import RulePool
from fuserl_megatron.util.errors import UserError

RULES = """
import ctypes, os, signal, socket, sys, time

def trouble(prompt, response, record, hang=100):
    word = response
    if word == "hang": time.sleep(hang)
    if word == "spin":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: pass
    if word == "crash": ctypes.string_at(0)
    if word == "memory": return len(bytearray(10**11))
    if word == "raise": raise KeyError("no such thing\\nsecond line")
    if word == "print":
        for _ in range(1000): print("x" * 10**6)
    if word == "stderr": os.write(2, b"x" * 2 * 10**6); os.write(2, b"x")
    if word == "fork": os.fork(); return 2
    if word == "orphan":
        if not os.fork():
            os.setsid(); time.sleep(60)
        return 3
    if word == "exit": sys.exit(1)
    if word == "hard exit": os._exit(7)
    if word == "nan": return float("nan")
    if word == "none": return None
    if word == "text": return "0.5"
    if word == "network": socket.create_connection(("127.0.0.1", record["port"]), timeout=1)
    if word == "names": return {"reward": 1, "style": 0.25}
    if word == "no reward": return {"style": 0.25}
    if word == "answers": os.write(1, b'{"value": 9}\\n'); print('{"value": 9}')
    if word == "stdin": sys.stdin.read()
    return float(len(prompt))

not_a_function = 3
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "rules_here.py").write_text(RULES)
    (tmp_path / "rules_bad.py").write_text("1 / 0")
    (tmp_path / "rules_exit.py").write_text("import os; os._exit(3)")
    monkeypatch.chdir(tmp_path)


def pool(function="rules_here:trouble", **settings):
    limits = dict(time_limit=1.0, memory_gib=0.25, workers=2) | settings
    return RulePool("mine", RuleReward(function=function, **limits))


EXPECTED = {
    "hang": "time limit: no answer within 1 s",
    "spin": "time limit: no answer within 1 s",
    "crash": "SIGSEGV",
    "memory": "out of memory",
    "raise": "KeyError: 'no such thing",
    "print": "printed or wrote more",
    "stderr": "printed or wrote more",
    "fork": 2.0,
    "orphan": 3.0,
    "exit": "SystemExit: 1",
    "hard exit": "exit code 7",
    "nan": "not a finite number",
    "none": "of type NoneType, not a number",
    "text": "of type str, not a number",
    "no reward": "without 'reward'",
    "answers": 2.0,
    "stdin": 2.0,
    "good": 2.0,
}


def test_every_trouble_costs_its_row_alone():
    words = [word for bad in EXPECTED for word in (bad, "good")]
    started = time.monotonic()
    with pool() as rules:
        found = dict(rules.outcomes((i, sample("Hi", word)) for i, word in enumerate(words)))
    assert time.monotonic() - started < 20
    assert sorted(found) == list(range(len(words)))
    for i, word in enumerate(words):
        expected = EXPECTED[word]
        if isinstance(expected, float):
            assert found[i] == {"value": expected}, word
        else:
            assert expected in found[i]["error"] and "\n" not in found[i]["error"], (word, found[i])
    assert rules.num_restarts >= 6


def test_a_number_with_parts_and_large_rows():
    with pool(time_limit=20.0) as rules:
        rows = [(0, sample("Hi", "names")), (1, sample("x" * 3_000_000, "good"))]
        found = dict(rules.outcomes(rows))
    assert found == {0: {"value": 1.0, "parts": {"style": 0.25}}, 1: {"value": 3e6}}


def test_an_answer_that_we_were_slow_to_fetch_is_not_late():
    with pool(time_limit=0.5) as rules:
        coming = rules.outcomes((i, sample("Hi", "good")) for i in range(6))
        found = [next(coming)]
        time.sleep(0.7)
        found += coming
    assert dict(found) == {i: {"value": 2.0} for i in range(6)}


def test_no_network_where_the_kernel_allows():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        row = [(0, sample("Hi", "network", port=server.getsockname()[1]))]
        with pool(workers=1, time_limit=5.0) as rules:
            found = dict(rules.outcomes(row))[0]
            assert ("error" in found) == rules.about["no_network"]
            assert len(rules.warnings()) == 2 - rules.about["no_network"] - rules.about["own_processes"]
        with pool(workers=1, network="on") as rules:
            assert dict(rules.outcomes(row))[0] == {"value": 2.0}


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("no_such_module:f", "there is no module no_such_module"),
        ("rules_here:troubles", "rules_here has no troubles. Did you mean trouble?"),
        ("rules_here:not_a_function", "is of type int, no function"),
        ("rules_bad:f", "importing rules_bad fails with ZeroDivisionError"),
        ("rules_exit:f", "cannot be imported .its process ended .exit code 3"),
    ],
)
def test_a_rule_that_is_not_there_is_one_line(function, words):
    with pytest.raises(UserError, match=f"rewards.mine.function={function}: {words}"):
        pool(function).__enter__()


def test_the_code_is_part_of_the_plan(tmp_path):
    with pool() as rules:
        before = rules.settings()
    (tmp_path / "rules_here.py").write_text(RULES + "# changed\n")
    with pool() as rules:
        assert rules.settings() != before


def test_workers_die_with_their_parent(tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from making_helpers import sample; from fuserl_megatron.making.rules import RulePool\n"
        "from fuserl_megatron.config.score_sections import RuleReward\n"
        "rule = RuleReward(function='rules_here:trouble', time_limit=60.0, workers=1)\n"
        "with RulePool('mine', rule) as rules:\n"
        "    print(rules._workers[0].process.pid, flush=True)\n"
        "    list(rules.outcomes([(0, sample('Hi', 'hang'))]))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        try:
            with open(f"/proc/{worker}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    raise AssertionError("the worker lives on")
