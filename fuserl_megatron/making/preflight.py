"""Before the first of a million answers: is it the right model, and is it asked what we think it is asked?

What a server does not do is silent: a misspelt sampling setting is ignored with status 200, a doubled begin-of-text
token ruins every answer without an error, and a context that is too small cuts answers. Each is one line here.
"""

import asyncio
import dataclasses
import json
from typing import Any

from fuserl_megatron.making.endpoint import Endpoint
from fuserl_megatron.making.faults import Fault, fault_of_error, fault_of_status
from fuserl_megatron.making.prompt_proof import Proof, Tokens, load_tokenizer
from fuserl_megatron.making.prompts import Prompt
from fuserl_megatron.making.sources import BadReply, Source
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import nearest

PROBE = (("user", "What is 2 + 2?"),)
PROBE_TOKENS = 16
TIMEOUT_S = 300.0
"""A server that has just been started compiles on its first request."""
ATTEMPTS, PAUSE_S, LONGEST_PAUSE_S = 5, 0.5, 30.0
ENOUGH_FIELDS = 10
"""A list of fields shorter than this is no list of what a server takes."""


@dataclasses.dataclass
class Findings:
    """What the look at a server showed."""

    facts: list[str]
    """Lines to print."""
    context: int | None = None
    """Tokens that prompt and answer may have together, where it says so."""


class Preflight:
    """One look at one server. `check` does all of it.

    Attributes:
        version: the server's own, where it says one.
        known: the fields that it takes in a request; empty where it does not list them.
    """

    def __init__(self, source: Source, endpoint: Endpoint, session: Any):
        self.source, self.endpoint, self.session = source, endpoint, session
        self.config, self.name = source.config, source.name
        self.version: str | None = None
        self.known: set[str] = set()

    async def check(self, longest: list[Prompt], on_too_long: str) -> Findings:
        """Ask the server for what it is, prove the prompt, compare the longest prompts with its context.

        Raises:
            UserError: one line for the first thing that is wrong.
        """
        found = Findings([])
        context = await self._model()
        self.known = known = await self._known_fields()
        body = self.source.body(PROBE, 1)
        self._check_fields(body, known, found)
        version = await self._get(self.endpoint.root + "/version")
        self.version = version.get("version") if isinstance(version, dict) else None
        reply = await self._probe(body, known)
        tokenizer = await asyncio.to_thread(load_tokenizer, self.config)
        tokens = await self._tokens(body, reply, tokenizer)
        found.facts.append(Proof(self.config, tokenizer).check(tokens))
        found.context = context or tokens.context
        found.facts.append(await self._check_room(longest, found.context, tokenizer, on_too_long))
        return found

    async def _model(self) -> int | None:
        """Is the model there; returns the context where the server says it."""
        listed = await self._get(self.endpoint.url + "/models", must_connect=True)
        entries = listed.get("data") if isinstance(listed, dict) else None
        entries = [entry for entry in entries or [] if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        names = [entry["id"] for entry in entries]
        if not names:
            return None  # the probe will tell
        if self.config.model not in names:
            have = f"{self.endpoint.url} has {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            raise UserError(f"{self.name}: model={self.config.model}: {have}.{nearest(self.config.model, names)}")
        entry = next(entry for entry in entries if entry["id"] == self.config.model)
        context = entry.get("max_model_len")
        return context if isinstance(context, int) else None

    async def _known_fields(self) -> set[str]:
        """What a request may hold, of a server that publishes it; empty of any other."""
        api = await self._get(self.endpoint.root + "/openapi.json")
        try:
            described = api["paths"]["/v1" + self.source.path]["post"]["requestBody"]["content"]["application/json"]
            schema = described["schema"]
            if "$ref" in schema:
                schema = api["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
            fields = set(schema["properties"])
        except (KeyError, TypeError):
            return set()
        return fields if len(fields) >= ENOUGH_FIELDS else set()

    def _check_fields(self, body: dict[str, Any], known: set[str], found: Findings) -> None:
        """A field that the server does not know would be ignored without a word."""
        for key in body if known else ():
            if key not in known:
                where = "extra_body." if key in self.config.sampling.extra_body else ""
                what = f"sampling.{where}{key}" if key != "chat_template_kwargs" else key
                raise UserError(f"{self.name}: {what}: the server knows no such field.{nearest(key, known)}")
        beyond: list[str] = [key for key in ("top_k", "min_p", "repetition_penalty", "min_tokens") if key in body]
        beyond += list(self.config.sampling.extra_body)
        if not known and beyond:
            found.facts.append(f"not proved: whether the server, which lists no fields, obeys {', '.join(beyond)}")

    async def _probe(self, body: dict[str, Any], known: set[str]) -> dict[str, Any]:
        """One short answer, with the ids of the prompt where the server can give them."""
        limit = self.config.max_tokens_field
        asked = body | {limit: min(PROBE_TOKENS, body[limit])}
        asked.pop("min_tokens", None)
        if "return_token_ids" in known:
            asked["return_token_ids"] = True
        reply = await self.post(self.endpoint.url + self.source.path, asked)
        try:
            self.source.answer(reply)
        except BadReply as bad:
            raise UserError(f"{self.name}: {self.endpoint.url}: {bad}") from None
        return reply

    async def _tokens(self, body: dict[str, Any], reply: dict[str, Any], tokenizer: Any) -> Tokens:
        """What the server made of the probe, from whatever it tells."""
        tokens = Tokens(body, (reply.get("usage") or {}).get("prompt_tokens"))
        ids = reply.get("prompt_token_ids") or reply["choices"][0].get("prompt_token_ids")
        asked = of_tokenize(body)
        told = await self.tokenize(asked)
        if told is not None:
            tokens.context = told.get("max_model_len")
            if self.config.kind == "chat":
                without = await self.tokenize(asked | {"add_generation_prompt": False})
                tokens.with_generation_prompt = told["tokens"]
                tokens.without = without["tokens"] if without else None
            bare = await self.tokenize({"model": body["model"], "prompt": "a", "add_special_tokens": True})
            plain = await self.tokenize({"model": body["model"], "prompt": "a", "add_special_tokens": False})
            if bare and plain and bare["tokens"] != plain["tokens"]:
                tokens.bos = bare["tokens"][0]
        tokens.ids = ids or (told["tokens"] if told else None)
        return tokens

    async def _check_room(self, longest: list[Prompt], context: int | None, tokenizer: Any, on_too_long: str) -> str:
        """Compare the longest prompts and max_tokens with the context."""
        if context is None:
            return "the server does not tell its context: whether the longest prompts fit is not known"
        most, place = 0, ("", 0)
        for prompt in longest:
            count = await self._count(self.source.body(prompt.messages, None), tokenizer)
            if count is None:
                return f"context {context}; without a tokenizer the longest prompt is not counted"
            if count > most:
                most, place = count, prompt.place
        need = most + self.config.sampling.max_tokens
        fact = f"context {context}, longest prompt {most} tokens, max_tokens {self.config.sampling.max_tokens}"
        if need > context and on_too_long == "stop":
            where = f"{place[0]}:{place[1]} has {most} tokens, with max_tokens={self.config.sampling.max_tokens} {need}"
            remedy = "lower sampling.max_tokens, give the server a larger context, or set on_too_long=allow"
            raise UserError(f"{self.name}: {where}, but the server's context is {context}; {remedy}")
        return fact if need <= context else f"{fact}: does not fit, such answers are cut or fail (on_too_long=allow)"

    async def _count(self, body: dict[str, Any], tokenizer: Any) -> int | None:
        if tokenizer is not None:
            return len(tokenizer.ids(body))
        asked = of_tokenize(body)
        told = await self.tokenize(asked)
        return None if told is None else len(told["tokens"])

    async def tokenize(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The reply of vLLM's /tokenize; None where the server has nothing like it."""
        try:
            told = await self.post(self.endpoint.root + "/tokenize", asked)
        except UserError:
            return None
        return told if isinstance(told, dict) and isinstance(told.get("tokens"), list) and told["tokens"] else None

    async def _get(self, url: str, must_connect: bool = False) -> Any:
        """The JSON there; None for anything but a good reply."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=30)
        try:
            async with self.session.get(url, headers=self.endpoint.headers, timeout=timeout) as reply:
                content = await reply.read()
                if reply.status in (401, 403):
                    reason = fault_of_status(reply.status, reply.headers, content).reason
                    raise UserError(f"{self.name}: {url}: {self.endpoint.without_key(reason)}; see api_key_env")
                return json.loads(content) if reply.status == 200 else None
        except UserError:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            fault = fault_of_error(error)
            if must_connect and fault.kind == "lost":
                raise self._unreachable(fault) from None
        return None

    async def post(self, url: str, body: dict[str, Any]) -> Any:
        """The JSON of a good reply; what may be one bad moment is tried again.

        Raises:
            UserError: nobody listens, or the server refuses.
        """
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        for attempt in range(ATTEMPTS):
            try:
                async with self.session.post(url, json=body, headers=self.endpoint.headers, timeout=timeout) as reply:
                    content = await reply.read()
                    if reply.status == 200:
                        return json.loads(content)
                    fault = fault_of_status(reply.status, reply.headers, content)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                fault = fault_of_error(error)
            if fault.kind == "lost":
                raise self._unreachable(fault)
            if fault.kind not in ("broken", "busy"):
                break
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(PAUSE_S * 2**attempt if fault.wait is None else min(fault.wait, LONGEST_PAUSE_S))
        advice = "; see api_key_env" if fault.kind == "stop" else ""
        raise UserError(f"{self.name}: {url}: {self.endpoint.without_key(fault.reason)}{advice}")

    def _unreachable(self, fault: Fault) -> UserError:
        return UserError(f"{self.name}: {self.endpoint.url}: {fault.reason}; start the server, or correct url")


def of_tokenize(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request that /tokenize takes."""
    names = ("model", "messages", "prompt", "chat_template_kwargs")
    return {name: body[name] for name in names if name in body}
