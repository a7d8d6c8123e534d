"""How a source is asked and how its answer is read: the body of a request, the fields of a row, what makes a plan.

One request is one answer (n = 1) with its own seed: with n > 1 servers give seeds that collide, ignore n, or return
the same answer n times. The seed follows from the row's key, so an answer that is asked for again is asked alike.
"""

import dataclasses
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuserl_megatron.config.sample_sections import SampleConfig, SourceConfig
from fuserl_megatron.making.accounting import Plan
from fuserl_megatron.making.faults import Fault
from fuserl_megatron.making.parts import key_of
from fuserl_megatron.making.prompts import Prompt
from fuserl_megatron.records.files import rows
from fuserl_megatron.records.messages import BadRecord, Messages, as_dicts, canonical_prompt, text_field
from fuserl_megatron.records.records import decode
from fuserl_megatron.records.thinking import THINKING
from fuserl_megatron.util.errors import UserError

if TYPE_CHECKING:
    from fuserl_megatron.making.client import Job

Post = Callable[..., Awaitable[Any]]
"""post(path, body, at_root=False) -> the JSON of a good reply; Refused, or an error of the client's library."""
VERSION = 1
"""Part of every plan: a change of what is asked for the same settings makes another plan."""


GIVEN_UP = ("abort", "error", "cancelled")
"""Finish reasons of a server that ended the answer itself, such as one that is being stopped."""


class BadReply(Exception):
    """A reply with status 200 that is no answer; the message says why."""


class Refused(Exception):
    """A request that brought no answer, with what is known of the reason."""

    def __init__(self, fault: Fault):
        super().__init__(fault.reason)
        self.fault = fault


class Source:
    """One source with its demonstrations read.

    Attributes:
        path: what stands behind the address, such as /chat/completions.
    """

    def __init__(self, config: SourceConfig):
        """Raises UserError: the demonstrations cannot be read."""
        self.config = config
        self.name: str = config.name or ""  # loading gives every source the name of its file
        self.demonstrations = read_demonstrations(config.demonstrations) if config.demonstrations else []
        self.path = "/chat/completions" if config.kind == "chat" else "/completions"
        self._fixed = self._settings_of_requests()

    def refuse(self, messages: Messages) -> str | None:
        """Why a prompt cannot be put to this source; None where it can."""
        if self.config.kind == "completion" and [role for role, *_ in messages] != ["user"]:
            roles = ", ".join(role for role, *_ in messages)
            return f"source {self.name} is a completion source and takes a single user message, not {roles}"
        return None

    async def ask(self, job: "Job", post: Post) -> dict[str, Any]:
        """One answer, with the fields of `answer`.

        Raises:
            BadReply: as of `answer`.
            Refused: the server's refusal.
        """
        return self.answer(await post(self.path, self.body(job.prompt.messages, job.seed)))

    def body(self, messages: Messages, seed: int | None) -> dict[str, Any]:
        """The request for one answer."""
        body = dict(self._fixed)
        if self.config.kind == "chat":
            body["messages"] = self.chat(messages)
        else:
            body["prompt"] = self.text(messages[0][1] or "")
        if seed is not None and self.config.send_seed:
            body["seed"] = seed
        return body

    def answer(self, reply: Any) -> dict[str, Any]:
        """The fields of a row that come from the server: response, reasoning (where there is any), finish_reason,
        prompt_tokens and tokens (null where the server does not count), model; with `logprobs` source_mean_logps,
        unless the answer came with reasoning, whose tokens cannot be told from its own.

        Raises:
            BadReply: not one choice, no text in it, one that the server gave up, or no log-probabilities.
        """
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list):
            raise BadReply(f"no choices in the reply: {json.dumps(reply)[:200]}")
        if len(choices) != 1:
            raise BadReply(f"{len(choices)} choices where one was asked for")
        choice, reasoning = choices[0], None
        if choice.get("finish_reason") in GIVEN_UP:
            raise BadReply(f"the server gave the answer up (finish_reason {choice['finish_reason']})")
        if self.config.kind == "chat":
            message = choice.get("message") or {}
            text = message.get("content") or ""
            reasoning = message.get("reasoning_content") or message.get("reasoning")
        else:
            text = choice.get("text")
            text = text.strip() if isinstance(text, str) else text
        if not isinstance(text, str):
            raise BadReply(f"the answer is no text: {json.dumps(choice)[:200]}")
        if self.config.reasoning == "apart" and not reasoning:
            reasoning, text = split_reasoning(text)
        usage = reply.get("usage") or {}
        means = {self.name: mean_logp(choice)} if self.config.logprobs and text and not reasoning else {}
        return {
            "response": text,
            **({"source_mean_logps": means} if means else {}),
            **({"reasoning": reasoning} if reasoning else {}),
            "finish_reason": choice.get("finish_reason"),
            "prompt_tokens": usage.get("prompt_tokens"),
            "tokens": usage.get("completion_tokens"),
            "model": reply.get("model") or self.config.model,
        }

    def plan(self, run: SampleConfig, notes: dict[str, Any]) -> Plan:
        """What changes an answer. The prompts and n are no part of it: each answer stands for itself."""
        config = self.config
        asked = {
            name: value for name, value in dataclasses.asdict(config.sampling).items() if value not in (None, (), {})
        }
        settings = self.prompt_settings() | {
            "reasoning": config.reasoning,
            "sampling": asked,
            "send_seed": config.send_seed,
            "seed": run.seed,
        }
        if config.logprobs:
            settings["logprobs"] = True
        return Plan(settings=settings, notes=notes)

    def prompt_settings(self) -> dict[str, Any]:
        """The part of a plan that says which model is asked, and what of."""
        config = self.config
        settings = {
            "version": VERSION,
            "source": self.name,
            "kind": config.kind,
            "model": config.model,
            "revision": config.revision,
            "system": config.system,
            "demonstrations": key_of(*map(tuple, self.demonstrations)).hex() if self.demonstrations else None,
        }
        if config.kind == "chat":
            return settings | {"chat_template_kwargs": config.chat_template_kwargs}
        return settings | {"prompt_format": config.prompt_format, "separator": config.separator}

    def _settings_of_requests(self) -> dict[str, Any]:
        config, sampling = self.config, dataclasses.asdict(self.config.sampling)
        extra = sampling.pop("extra_body") | {config.max_tokens_field: sampling.pop("max_tokens")}
        body = {"model": config.model} | {key: value for key, value in sampling.items() if value not in (None, ())}
        if config.chat_template_kwargs:
            body["chat_template_kwargs"] = config.chat_template_kwargs
        if config.logprobs:
            body["logprobs"] = True if config.kind == "chat" else 1
        return body | extra

    def chat(self, messages: Messages) -> list[dict[str, Any]]:
        """The conversation as it is sent: system message and demonstrations in front."""
        chat = as_dicts(messages)
        if self.config.system is not None and chat[0]["role"] != "system":
            chat.insert(0, {"role": "system", "content": self.config.system})
        at = 1 if chat[0]["role"] == "system" else 0
        chat[at:at] = [
            {"role": role, "content": text}
            for pair in self.demonstrations
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return chat

    def text(self, prompt: str) -> str:
        """The text that a base model is to continue."""
        asked = self.config.prompt_format.replace
        shown = [f"{asked('{prompt}', question)} {answer}" for question, answer in self.demonstrations]
        return self.config.separator.join([*shown, asked("{prompt}", prompt)])


def mean_logp(choice: dict[str, Any]) -> float:
    """The mean log-probability of an answer's tokens, as its server gives them.

    Raises:
        BadReply: it gives none.
    """
    given = choice.get("logprobs") or {}
    values = [entry.get("logprob") for entry in given.get("content") or ()] or given.get("token_logprobs") or []
    if not values or not all(isinstance(value, int | float) for value in values):
        raise BadReply("no log-probabilities in the reply: this server gives none; leave logprobs out")
    return min(sum(values) / len(values), 0.0)


def row_of(source: Source, prompt: Prompt, index: int, answer: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """A row as it is kept: the prompt as given, what the server said, and how it was asked."""
    row = {"prompt_id": prompt.id, "prompt": prompt.given, "source": source.name, "index": index, **answer, **how}
    return row if prompt.meta is None else row | {"meta": prompt.meta}


def key_of_answer(plan_id: str, source: str, prompt_id: str, index: int) -> bytes:
    """The name of one answer."""
    return key_of(plan_id, source, prompt_id, index)


def seed_of(key: bytes) -> int:
    """31 bits, which every server takes."""
    return int.from_bytes(key[:4], "big") >> 1


def split_reasoning(text: str) -> tuple[str | None, str]:
    """(reasoning, answer) of a text that begins with a block of reasoning, whose opening mark the template may have
    written; (None, text) of any other. An answer that was cut while it reasoned is empty."""
    bare = text.lstrip()
    for opening, closing in THINKING:
        begun = bare.startswith(opening)
        before, found, after = bare.partition(closing)
        if begun or (found and opening not in before):
            return before.removeprefix(opening).strip() or None, after.strip() if found else ""
    return None, text


def read_demonstrations(path: str) -> list[tuple[str, str]]:
    """(prompt, response) of each line of a JSONL file.

    Raises:
        UserError: the file is not there or empty, or a line has no two texts.
    """
    if not Path(path).is_file():
        raise UserError(f"demonstrations={path}: no such file; give a JSONL file of prompt and response")
    pairs = []
    for place, raw in rows(path, needed=("prompt", "response")):
        record = raw if isinstance(raw, dict) else decode(place, raw)
        for name in ("prompt", "response"):
            if name not in record:
                raise BadRecord(place, name, f"field {name!r} is missing: a demonstration has prompt and response")
        messages = canonical_prompt(place, record["prompt"])
        if [role for role, *_ in messages] != ["user"]:
            raise BadRecord(place, "prompt", "field 'prompt' of a demonstration must be a text")
        pairs.append((messages[0][1] or "", text_field(place, "response", record["response"])))
    if not pairs:
        raise UserError(f"demonstrations={path}: holds none; give lines of prompt and response, or leave it out")
    return pairs
