"""Rewards from a server: its sigmoid is proven off, its faults are one line or tried again. A local stub answers."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from making_helpers import sample

from fuserl_megatron.config.score_sections import EndpointReward
from fuserl_megatron.making import reward_endpoint
from fuserl_megatron.making.reward_endpoint import Endpoint
from fuserl_megatron.util.errors import UserError


def raw(conversation, scale=10.0):
    text = conversation[-1]["content"]
    return scale * math.sin(sum(map(ord, text)))


class Stub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *words):
        pass

    def reply(self, content, status=200):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/v1/models":
            self.reply({"data": [{"id": name, "root": "org/rm"} for name in self.server.names]})
        else:
            self.reply({"version": "0.32.0"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        if self.server.faults:
            status, content = self.server.faults.pop(0)
            return self.reply(content, status)
        if len(body["messages"][-1]["content"]) > 1000:
            return self.reply({"error": {"message": "This model's maximum context length is 512 tokens."}}, 400)
        value = raw(body["messages"], self.server.scale)
        key = "probs" if self.path == "/classify" else "data"
        kind = self.server.kind
        if kind == "always sigmoid" or (kind == "good" and body["use_activation"]):
            value = 1 / (1 + math.exp(-value))
        values = {"five labels": [value] * 5, "nan": [math.nan], "constant": [3.0]}.get(kind, [value])
        if kind == "no value":
            return self.reply({"data": [{"embedding": values}]})
        self.reply({"data": [{key: values}]})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(reward_endpoint, "FIRST_WAIT_S", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as stub:
        stub.kind, stub.names, stub.scale, stub.faults, stub.seen = "good", ["rm"], 10.0, [], []
        stub.daemon_threads = True
        stub.url = f"http://127.0.0.1:{stub.server_address[1]}"
        threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield stub
        stub.shutdown()


def endpoint(server, **settings):
    return Endpoint("rm", EndpointReward(url=(server.url,), in_flight=4, **settings))


def values(open_endpoint, words):
    found = dict(open_endpoint.outcomes((i, sample("Hi", word)) for i, word in enumerate(words)))
    return [found[i] for i in range(len(words))]


@pytest.mark.parametrize("api", ["classify", "pooling"])
def test_raw_values_come_from_either_interface(server, api):
    with endpoint(server, api=api) as rewards:
        words = [f"answer {i}" for i in range(40)]
        assert values(rewards, words) == [{"value": raw([{"content": word}])} for word in words]
        assert rewards.settings() == {"model": "rm", "root": "org/rm"}
        assert rewards.notes()["server_version"] == ["0.32.0"]
    path, body, _ = server.seen[-1]
    assert path == f"/{api}" and body["use_activation"] is False and body["add_generation_prompt"] is False
    assert [m["role"] for m in body["messages"]] == ["user", "assistant"]


def test_a_sigmoid_that_is_left_on_is_refused(server):
    server.kind = "always sigmoid"
    with pytest.raises(UserError, match="leave the sigmoid on.*trust_scale") as raised:
        endpoint(server).__enter__()
    assert "\n" not in str(raised.value)
    with endpoint(server, trust_scale=True) as rewards:
        assert 0 < values(rewards, ["x"])[0]["value"] < 1


def test_rewards_between_0_and_1_are_proven_by_their_sigmoid(server, monkeypatch):
    monkeypatch.setattr("test_reward_endpoint.raw", lambda c, scale=1: (sum(map(ord, c[-1]["content"])) % 97) / 100)
    with endpoint(server) as rewards:
        assert values(rewards, ["x"]) == [{"value": (ord("x") % 97) / 100}]
    server.kind = "never sigmoid"  # the same numbers, and nothing to prove them by
    with pytest.raises(UserError, match="with and without use_activation"):
        endpoint(server).__enter__()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("five labels", "gives 5 values for one answer"),
        ("nan", "gives nan, not a finite number"),
        ("constant", "gives 3.0 for every text"),
        ("no value", "answers with no value"),
    ],
)
def test_what_is_no_reward_is_one_line(server, kind, words):
    server.kind = kind
    with pytest.raises(UserError, match=words):
        endpoint(server).__enter__()


def test_pair_scoring_is_refused(server):
    server.url += "/score"
    with pytest.raises(UserError, match="pairs of texts"):
        endpoint(server)


def test_models_are_looked_up(server):
    with pytest.raises(UserError, match="model=rmm: .*the server has rm. Did you mean rm?"):
        endpoint(server, model="rmm").__enter__()
    server.names = ["one", "two"]
    with pytest.raises(UserError, match="model=null: .*the server has one, two. Set rewards.rm.model"):
        endpoint(server).__enter__()


def test_no_server_and_a_missing_key(server, monkeypatch):
    url = server.url
    server.url = "http://127.0.0.1:9"
    with pytest.raises(UserError, match="Connection refused"):
        endpoint(server).__enter__()
    monkeypatch.delenv("RM_KEY", raising=False)
    with pytest.raises(UserError, match="api_key_env=RM_KEY: not set in the environment"):
        endpoint(server, api_key_env="RM_KEY")
    server.url = url
    monkeypatch.setenv("RM_KEY", "abc-123-very-secret")
    with endpoint(server, api_key_env="RM_KEY") as rewards:
        values(rewards, ["x"])
    assert server.seen[-1][2] == "Bearer abc-123-very-secret"


def test_faults_of_the_server_are_tried_again_and_a_refused_row_is_not(server):
    with endpoint(server) as rewards:
        server.faults += [(503, {"error": "busy"}), (500, b"<html>"), (200, b'{"data": [{"pr')]
        found = values(rewards, ["a", "x" * 2000, "b"])
        assert found[0] == {"value": raw([{"content": "a"}])} and "value" in found[2]
        assert found[1] == {"error": "HTTP 400 This model's maximum context length is 512 tokens."}
        server.faults += [(500, b"dead")] * 50
        with pytest.raises(UserError, match="HTTP 500 dead .5 attempts.*nothing is lost"):
            values(rewards, ["c"])
    server.faults.clear()
    server.faults += [(404, {"message": "not found"})]
    with pytest.raises(UserError, match="--runner pooling"):
        endpoint(server).__enter__()
