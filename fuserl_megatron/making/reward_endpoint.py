"""A reward model behind a vLLM server: its `/classify` or `/pooling`, with the sigmoid left out and proven so.

By default the server gives the sigmoid of the reward, so that rewards of 12 and of 25 are both 1.0, and it takes names
of settings that it does not know without a word. So before anything is scored, probe conversations are sent twice, with
and without the activation: the values without must leave [0, 1], or their sigmoid must be the values with.
The conversation goes as messages: the server applies the model's own template, and no BOS can be doubled.
"""

import http.client
import json
import math
import random
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from fuserl_megatron.config.score_sections import EndpointReward
from fuserl_megatron.making.answers import Answer
from fuserl_megatron.making.conversation import Unscorable
from fuserl_megatron.making.faults import message_of, retry_after
from fuserl_megatron.records.messages import Messages, as_dicts
from fuserl_megatron.util.credentials import key_of_environment
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import first_line, nearest

PROBES: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of France?", "asdf asdf asdf asdf"),
    ("How do I sort a list in Python?", "Use sorted(items), or items.sort() to sort it in place."),
    ("How do I sort a list in Python?", "No."),
    ("Write a friendly greeting.", "Go away, you fool. I hate you and everybody else."),
    ("Write a friendly greeting.", "Hello there! It is lovely to see you. How has your day been so far?"),
    ("Explain rain.", "Water evaporates, rises, cools and condenses into drops that fall when they are heavy enough."),
    ("Explain rain.", "rain rain rain rain rain rain rain rain rain rain rain rain rain rain rain rain rain rain"),
)
SAME = 5e-3
"""Largest difference of two values that count as one: servers compute in bfloat16."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses that may pass: the server's fault, or its queue is full."""


class Endpoint:
    """The servers of one reward. A context manager."""

    def __init__(self, name: str, reward: EndpointReward):
        self.name, self.reward, self.where = name, reward, f"rewards.{name}"
        self._key = key_of_environment(f"{self.where}.", reward.api_key_env)
        self._urls = [_base(self.where, url) for url in reward.url]
        self._turn, self._closing, self._connections = 0, threading.Event(), threading.local()

    def __enter__(self) -> "Endpoint":
        """Ask the servers for the model and prove that they give rewards.

        Raises:
            UserError: no server, no such model, several labels, or a sigmoid that is left on.
        """
        found = [self._model(url) for url in self._urls]
        self.model = found[0]["id"]
        self.root = found[0].get("root") or self.model
        if other := next((m for m in found if (m.get("root") or m["id"]) != self.root), None):
            raise UserError(f"{self.where}.url: the servers have different models ({self.root}, {other['id']})")
        self.version = [self._version(url) for url in self._urls]
        for url in self._urls:
            self._prove(url)
        return self

    def __exit__(self, *_error: object) -> None:
        self._closing.set()

    def settings(self) -> dict[str, Any]:
        """What changes a value, as far as a client can see it."""
        return {"model": self.model, "root": self.root}

    def notes(self) -> dict[str, Any]:
        """Where it is, which version of the server."""
        return {"url": list(self._urls), "api": self.reward.api, "server_version": self.version}

    def warnings(self) -> list[str]:
        """Nothing: what is wrong with a server is refused."""
        return []

    def outcomes(self, samples: Iterable[tuple[int, Answer]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Score samples, each under a position; outcomes come as they are ready. At most 2 in_flight are read ahead."""
        waiting = iter(samples)
        with ThreadPoolExecutor(self.reward.in_flight) as pool:
            running: dict[Future, int] = {}
            try:
                while True:
                    while len(running) < 2 * self.reward.in_flight and (entry := next(waiting, None)):
                        running[pool.submit(self._outcome, entry[1])] = entry[0]
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(future), future.result()
            finally:
                if running:  # something went wrong: nothing new is sent, what is under way is waited for
                    self._closing.set()
                for future in running:
                    future.cancel()

    def _outcome(self, sample: Answer) -> dict[str, Any]:
        try:
            self._turn += 1
            return {"value": self._value(self._urls[self._turn % len(self._urls)], sample.messages, sample.response)}
        except Unscorable as error:
            return {"error": str(error)}

    def _value(self, url: str, messages: Messages, response: str, activation: bool = False) -> float:
        """The reward of one conversation.

        Raises:
            Unscorable: the server refuses this conversation (too long, say).
            UserError: it answers with something that is no reward, or not at all after all attempts.
        """
        conversation = [*as_dicts(messages), {"role": "assistant", "content": response}]
        body = {"model": self.model, "messages": conversation, "add_generation_prompt": False}
        body["use_activation"] = activation
        if self.reward.api == "pooling":
            body["task"] = "classify"
        answer = self._ask(f"{url}/{self.reward.api}", body)
        try:
            values = answer["data"][0]["probs" if self.reward.api == "classify" else "data"]
            values = list(values) if isinstance(values, list) else [values]
        except (KeyError, IndexError, TypeError):
            got = json.dumps(answer)[:120]
            raise UserError(f"{self.where}: {url}/{self.reward.api} answers with no value: {got}") from None
        if len(values) != 1:
            raise UserError(
                f"{self.where}: {url} gives {len(values)} values for one answer; a reward model has one label"
            )
        if not isinstance(values[0], int | float) or not math.isfinite(values[0]):
            raise UserError(f"{self.where}: {url} gives {values[0]}, not a finite number")
        return float(values[0])

    def _prove(self, url: str) -> None:
        plain: list[float] = []
        with_activation: list[float] = []
        for prompt, response in PROBES:
            for activation, values in ((False, plain), (True, with_activation)):
                try:
                    values.append(self._value(url, (("user", prompt),), response, activation))
                except Unscorable as error:
                    raise UserError(f"{self.where}: {url}/{self.reward.api} refuses a conversation: {error}") from None
        if max(plain) - min(plain) < 1e-9:
            raise UserError(f"{self.where}: {url} gives {plain[0]} for every text; no reward model")
        if any(not 0 <= value <= 1 for value in plain) or self.reward.trust_scale:
            return
        differs = max(abs(a - b) for a, b in zip(plain, with_activation, strict=True)) > SAME
        if differs and all(abs(_sigmoid(a) - b) < SAME for a, b in zip(plain, with_activation, strict=True)):
            return
        seen = f"{len(PROBES)} probes all give values in [0, 1] ({min(plain):.3f} to {max(plain):.3f})"
        what = "with and without use_activation" if not differs else "and not those whose sigmoid the server gives"
        raise UserError(
            f"{self.where}: {url} seems to leave the sigmoid on: {seen}, {what}; use a vLLM that knows use_activation, "
            f"or for a model whose rewards do lie there set {self.where}.trust_scale=true"
        )

    def _model(self, url: str) -> dict[str, Any]:
        try:
            there = self._ask(f"{url}/v1/models", None, attempts=1)["data"]
        except Unscorable as error:
            raise UserError(f"{self.where}: {url}/v1/models: {error}; is it a vLLM server?") from None
        names = [entry["id"] for entry in there]
        wanted = self.reward.model or (names[0] if len(names) == 1 else None)
        if wanted not in names:
            have = f"the server has {', '.join(names) or 'none'}"
            hint = nearest(wanted, names) if wanted else f" Set {self.where}.model."
            raise UserError(f"{self.where}.model={wanted or 'null'}: {url}: {have}.{hint}")
        return there[names.index(wanted)]

    def _version(self, url: str) -> str | None:
        try:
            return self._ask(f"{url}/version", None, attempts=1).get("version")
        except (Unscorable, UserError):
            return None

    def _ask(self, url: str, body: dict[str, Any] | None, attempts: int | None = None) -> dict[str, Any]:
        """One request, sent again while the fault is the server's."""
        data = None if body is None else json.dumps(body).encode()
        attempts, pause, why = attempts or self.reward.attempts, FIRST_WAIT_S, ""
        for attempt in range(attempts):
            if attempt and self._closing.wait(pause * random.uniform(0.8, 1.2)):
                break
            pause = min(2 * pause, LONGEST_WAIT_S)
            try:
                status, text, wait = self._send(url, data)
                found = json.loads(text) if status == 200 else None
            except ValueError as error:
                why = f"its answer is no JSON ({first_line(error)})"
                continue
            except (OSError, http.client.HTTPException) as error:  # no connection, reset, too slow, half an answer
                why = first_line(error)
                continue
            if isinstance(found, dict):
                return found
            why = "its answer is no JSON object" if status == 200 else f"HTTP {status} {message_of(text)}"
            if status != 200 and status not in BUSY:
                if status in (401, 403):
                    raise UserError(f"{self.where}: {url}: {why}; set {self.where}.api_key_env")
                if status == 404:
                    raise UserError(f"{self.where}: {url}: {why}; serve the model with --runner pooling")
                raise Unscorable(why)
            pause = max(pause, wait)
        tries = f" ({attempts} attempts)" if attempts > 1 else ""
        raise UserError(
            f"{self.where}: {url}: {why}{tries}; see to the server and type the same command again: nothing is lost"
        )

    def _send(self, url: str, data: bytes | None) -> tuple[int, bytes, float]:
        """(status, content, seconds that the server asks to wait), over a connection that each thread keeps open."""
        parts = urlsplit(url)
        open_ones = self._connections.__dict__
        connection = open_ones.get(parts.netloc)
        if connection is None:
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = open_ones[parts.netloc] = kind(parts.netloc, timeout=self.reward.timeout)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            connection.request("GET" if data is None else "POST", parts.path, data, headers)
            reply = connection.getresponse()
            return reply.status, reply.read(), min(retry_after(reply.headers.get("Retry-After")) or 0.0, LONGEST_WAIT_S)
        except BaseException:
            connection.close()  # the next request opens it anew
            raise


def _base(where: str, url: str) -> str:
    """The address without a path of the interface."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{where}.url={url}: write http:// or https:// in front")
    url = url.rstrip("/")
    if url.endswith(("/score", "/rerank")):
        raise UserError(f"{where}.url={url}: that scores pairs of texts; a reward comes from /classify or /pooling")
    for path in ("/classify", "/pooling", "/v1"):
        url = url.removesuffix(path)
    return url


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-max(min(value, 700), -700)))
