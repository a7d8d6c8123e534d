"""Servers of our own: started, ended with the run, started again when they die, and what is said when they do not."""

import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fuserl_megatron.config.sample_sections import ServerConfig, SourceConfig
from fuserl_megatron.making import client, endpoint, servers
from fuserl_megatron.making.finished import finished_rows
from fuserl_megatron.making.sample import sample
from fuserl_megatron.making.servers import command_of, environment
from fuserl_megatron.util.errors import UserError

STUB = Path(__file__).parents[2] / "stub_server.py"
COMMAND = f"{sys.executable} {STUB} {{port}}"


def children():
    return [p for p in psutil.Process().children(recursive=True) if str(STUB) in p.cmdline()]


def test_a_server_that_is_killed_twice_is_started_again_and_nothing_is_lost_or_doubled(settings, monkeypatch, capsys):
    monkeypatch.setattr(client, "TICK_S", 0.02)
    monkeypatch.setattr(endpoint, "FRESH_S", 0.02)
    monkeypatch.setattr(client, "BACK_OFF_S", 0.01)
    monkeypatch.setattr(servers, "PAUSE_S", 0.1)
    server = ServerConfig(command=COMMAND + " 0.05 0.01")  # an answer takes 10 ms, one request of twenty fails
    config, source = settings(300, n=2, source={"url": (), "server": server, "max_in_flight": 8}, max_attempts=20)
    part = Path(config.output) / "a" / "part-00000.jsonl"

    def kill():
        for rows in (50, 300):
            while not part.exists() or part.read_bytes().count(b"\n") < rows:
                time.sleep(0.01)
            os.killpg(children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert sample(config, [source]) == 0
    killer.join(1)
    keys = [row["key"] for row in finished_rows(Path(config.output) / "a")]
    assert len(keys) == len(set(keys)) == 600
    out = capsys.readouterr().out
    assert out.count("starting it again") == 2 and out.count("answers again") == 2
    assert not children()


def test_what_is_said_of_a_server_that_does_not_start(settings):
    def said(**server):
        config, source = settings(source={"url": (), "server": ServerConfig(**server)})
        with pytest.raises(UserError) as caught:
            sample(config, [source])
        assert "\n" not in str(caught.value) and not children()
        return str(caught.value)

    assert "no-such-program is not on PATH" in said(command="no-such-program {port}")
    failing = f"{sys.executable} -c 'raise SystemExit(\"ValueError: no room for {{port}}\")'"
    message = said(command=failing)
    assert "ended with code 1: ValueError: no room for" in message and "server-0.log" in message
    assert "does not answer after server.ready_seconds=0.3: it wrote nothing" not in said(
        command=f"{sys.executable} -c 'print(1); import time; time.sleep(60) # {{port}}'", ready_seconds=0.3
    )


def test_a_signal_while_a_server_starts(settings, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fuserl", "sample"])
    slow = f"{sys.executable} -c 'import time; time.sleep(60) # stub_server.py {{port}}'"
    config, source = settings(source={"url": (), "server": ServerConfig(command=slow)})
    others = set(psutil.Process().children())  # of earlier tests: the session's ranks
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    assert sample(config, [source]) == 0
    assert time.monotonic() - started < 10 and set(psutil.Process().children()) <= others
    assert (Path(config.output) / "REQUEUE").exists()


def test_the_command():
    server = ServerConfig(args={"tensor_parallel_size": 4, "enforce_eager": True, "swap": False, "dtype": "bfloat16"})
    source = SourceConfig(name="a", model="org/m d", revision="abc", server=server)
    assert command_of(source, 81) == shlex.split(
        "vllm serve 'org/m d' --host 127.0.0.1 --port 81 --served-model-name 'org/m d' --revision abc"
        " --tensor-parallel-size 4 --enforce-eager --dtype bfloat16"
    )


def test_replicas_share_the_gpus():
    two = ServerConfig(replicas=2)
    given = [environment(two, i, {"CUDA_VISIBLE_DEVICES": "3,4,6,7"})["CUDA_VISIBLE_DEVICES"] for i in range(2)]
    assert given == ["3,4", "6,7"]
    assert environment(ServerConfig(), 0, {"CUDA_VISIBLE_DEVICES": "3,4"})["CUDA_VISIBLE_DEVICES"] == "3,4"
    with pytest.raises(UserError, match="3 GPUs cannot be shared out evenly"):
        environment(two, 0, {"CUDA_VISIBLE_DEVICES": "0,1,2"})
