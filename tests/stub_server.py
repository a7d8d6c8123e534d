"""A server that answers at once, by a hash of what it is asked, and goes wrong as it is told: for volume and faults.

As a program: `python stub_server.py PORT [SHARE [DELAY]]`, the share of requests that fail, and seconds.
"""

import asyncio
import contextlib
import hashlib
import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator

from aiohttp import web

FAULTS = ("429", "500", "503", "reset", "slow", "half", "html")
SLOW_S = 0.3


class Stub:
    """Behaviour and counts; the attributes may be changed while it runs.

    Attributes:
        share: of the requests that go wrong in one of `faults`, at random.
        script: called with each request's body; a response instead of the answer, or None.
        healthy: what /health says.
        models: names that /v1/models lists; None answers 404.
        fields: what /openapi.json lists of a request; None answers 404.
        bos: ids in front of every prompt, of the server's own making.
        ends: whether prompts end with the generation prompt.
        between: ids that the template puts between it and an answer that is there.
    """

    def __init__(self, share: float = 0.0, faults: tuple[str, ...] = FAULTS, seed: int | None = None):
        self.share, self.faults, self.random = share, faults, random.Random(seed)
        self.script: Callable[[dict], web.Response | None] | None = None
        self.healthy, self.models, self.context = True, ["m"], 4096
        self.fields: set[str] | None = None
        self.bos: list[int] = []
        self.tokenizes, self.ends, self.delay = False, True, 0.0
        self.between: list[int] = []
        self.counts: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self.retry_after = "0"
        self.url = ""

    def ids(self, body: dict, ends: bool = True) -> list[int]:
        """A prompt as this server tokenizes it: a token a character, 1 in front, 2 as the generation prompt."""
        if "prompt" in body:
            return (
                [*self.bos, *(map(ord, body["prompt"]))]
                if body.get("add_special_tokens", True)
                else [*map(ord, body["prompt"])]
            )
        messages = body["messages"]
        if messages[-1]["role"] == "assistant":  # a finished turn: what ends it is 3 and a line break
            end = [] if body.get("continue_final_message") else [3, 10]
            begun = self.ids({"messages": messages[:-1]})
            return [*begun, *self.between, *map(ord, messages[-1]["content"]), *end]
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return [*self.bos, *map(ord, text), *([2] if ends and self.ends else [])]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """One of /v1/chat/completions and /v1/completions."""
        content = await request.read()
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            body = json.loads(content)
            if self.delay:
                await asyncio.sleep(self.delay)
            if self.script and (scripted := self.script(body)) is not None:
                return scripted
            if self.share and self.random.random() < self.share:
                return await self.fault(request)
            return web.json_response(self.reply(body))
        finally:
            self.in_flight -= 1

    def reply(self, body: dict) -> dict:
        """The answer is a function of what is asked and the seed."""
        asked = json.dumps([body.get("messages", body.get("prompt")), body.get("seed")])
        digest = hashlib.sha256(asked.encode()).hexdigest()
        self.counts["answers"] += 1
        self.seen[digest] += 1
        text, cut = f"{digest} " * 4, digest[0] == "0"
        choice = {"index": 0, "finish_reason": "length" if cut else "stop"}
        chat = "messages" in body
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": len(self.ids(body)), "completion_tokens": 20}
        given = {"prompt_token_ids": self.ids(body)} if body.get("return_token_ids") else {}
        if body.get("logprobs"):
            values = [-len(text) / 1000, -0.5]
            content = {"content": [{"logprob": v} for v in values]} if chat else {"token_logprobs": values}
            choice["logprobs"] = content
        if "prompt_logprobs" in body:
            given["prompt_logprobs"] = [
                None,
                *(self.likely(token, body["prompt_logprobs"]) for token in self.ids(body)[1:]),
            ]
        return {"model": body["model"], "choices": [choice], "usage": usage, **given}

    @staticmethod
    def likely(token: int, k: int) -> dict:
        """What is said of a token: its own log-probability, and k others that are likelier."""
        others = {str(token + 1 + i): {"logprob": -0.001 * (1 + i)} for i in range(k)}
        return {str(token): {"logprob": -(token % 7) / 4 - 0.25}, **others}

    async def fault(self, request: web.Request) -> web.StreamResponse:
        """Go wrong in one of the ways."""
        kind = self.random.choice(self.faults)
        self.counts[kind] += 1
        if kind in ("429", "503"):
            return web.json_response(
                {"error": {"message": "too busy"}}, status=int(kind), headers={"Retry-After": self.retry_after}
            )
        if kind == "500":
            return web.json_response({"error": {"message": "internal"}}, status=500)
        if kind == "html":
            return web.Response(text="<html>Bad gateway</html>", content_type="text/html")
        if kind == "slow":
            await asyncio.sleep(SLOW_S)
            return web.json_response(self.reply(json.loads(await request.read())))
        if kind == "half":
            response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
            await response.prepare(request)
            await response.write(b'{"choices": [')
        request.transport.abort()
        return web.Response()

    async def health(self, _request: web.Request) -> web.Response:
        self.counts["health"] += 1
        return web.Response(status=200 if self.healthy else 503)

    async def list_models(self, _request: web.Request) -> web.Response:
        if self.models is None:
            return web.Response(status=404)
        return web.json_response({"data": [{"id": name, "max_model_len": self.context} for name in self.models]})

    async def tokenize(self, request: web.Request) -> web.Response:
        if not self.tokenizes:
            return web.Response(status=404)
        body = await request.json()
        ids = self.ids(body, body.get("add_generation_prompt", True))
        return web.json_response({"tokens": ids, "max_model_len": self.context})

    async def openapi(self, _request: web.Request) -> web.Response:
        if self.fields is None:
            return web.Response(status=404)
        schema = {"properties": {name: {} for name in self.fields}}
        method = {
            "post": {"requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/R"}}}}}
        }
        paths = {"/v1/chat/completions": method, "/v1/completions": method}
        return web.json_response({"paths": paths, "components": {"schemas": {"R": schema}}})

    def app(self) -> web.Application:
        """The server's routes."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.answer)
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.list_models)
        app.router.add_get("/openapi.json", self.openapi)
        return app

    @contextlib.contextmanager
    def running(self, port: int = 0) -> Iterator["Stub"]:
        """Answer in a thread of this process as long as the body runs."""
        loop, ready = asyncio.new_event_loop(), threading.Event()

        async def start() -> web.AppRunner:
            runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", port)
            await site.start()
            self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
            ready.set()
            return runner

        def serve() -> None:
            asyncio.set_event_loop(loop)
            runner = loop.run_until_complete(start())
            loop.run_forever()
            loop.run_until_complete(runner.cleanup())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)


if __name__ == "__main__":
    stub = Stub(float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    stub.delay, stub.models = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0, None
    web.run_app(stub.app(), host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)
