"""How likely a source finds an answer that is there: the request, what of the reply counts, and the proof of both.

The whole conversation is sent as a prompt, and the server says how likely each of its tokens was (`prompt_logprobs`,
which vLLM has). The answer's tokens are those behind the prompt as the server renders it for an answer to follow, up to
and with the token that ends the turn: the tokens that training scores, too. For a base model, which has no such token,
they are those of the answer's text.
"""

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from fuserl_megatron.config.sample_sections import SourceConfig
from fuserl_megatron.making.faults import Fault
from fuserl_megatron.making.preflight import PROBE, Preflight, of_tokenize
from fuserl_megatron.making.sources import BadReply, Post, Refused, Source
from fuserl_megatron.records.messages import Messages
from fuserl_megatron.util.errors import UserError

if TYPE_CHECKING:
    from fuserl_megatron.making.client import Job

PROBE_ANSWER = "Four."
KEPT_PROMPTS = 1024
"""Prompts whose tokens are kept: the answers to one come one after the other."""


class LogprobSource(Source):
    """A source that is asked about answers.

    Attributes:
        tail: the tokens that end a turn; the first of them belongs to the answer. `prove` finds them.
    """

    def __init__(self, config: SourceConfig, top_k: int = 0):
        super().__init__(config)
        self.top_k, self.tail = top_k, list[int]()
        self._prompts: OrderedDict[str, list[int]] = OrderedDict()

    def whole(self, messages: Messages, response: str) -> dict[str, Any]:
        """The request about one answer. One token is asked for, as servers refuse none; it is thrown away."""
        body = self.body(messages, None)
        asked: dict[str, Any] = {"model": body["model"], "prompt_logprobs": self.top_k, "return_token_ids": True}
        asked |= {self.config.max_tokens_field: 1, "temperature": 0.0}
        if self.config.kind == "completion":
            return asked | {"prompt": f"{body['prompt']} {response}"}
        asked |= of_tokenize(body) | {"add_generation_prompt": False}
        return asked | {"messages": [*body["messages"], {"role": "assistant", "content": response}]}

    async def ask(self, job: "Job", post: Post) -> dict[str, Any]:
        """mean_logp (nats a token), tokens, with top_k also token_ids and top; and what the client counts.

        Raises:
            BadReply: no log-probabilities, or not those of the prompt that was sent.
            Refused: the server's refusal, or an answer without tokens.
        """
        prompt = self._prompts.get(job.prompt.id)
        if prompt is None:
            told = await post("/tokenize", of_tokenize(self.body(job.prompt.messages, None)), at_root=True)
            if not isinstance(told, dict) or not told.get("tokens"):
                raise BadReply("/tokenize gives no tokens")
            prompt = self._prompts[job.prompt.id] = told["tokens"]
            if len(self._prompts) > KEPT_PROMPTS:
                self._prompts.popitem(last=False)
        reply = await post(self.path, self.whole(job.prompt.messages, job.response))
        return self.values(reply, prompt)

    def values(self, reply: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
        """What a reply says, given the tokens of the prompt alone. Raises as of `ask`."""
        ids, given = _prompt_of(reply)
        start = _common(ids, prompt)
        if start < len(prompt) - 1:  # the last one may have grown together with the answer's first characters
            raise _useless("the prompt is another one with the answer behind it than without")
        if self.tail and ids[-len(self.tail) :] != self.tail:
            raise _useless("the conversation does not end as one of this template does")
        ids = ids[: len(ids) - max(len(self.tail) - 1, 0)]
        if len(ids) - start < 1 + bool(self.tail):
            raise _useless("the answer has no tokens")
        own = [given[i][str(ids[i])]["logprob"] for i in range(start, len(ids))]
        if not all(map(math.isfinite, own)):
            raise BadReply("a log-probability is not finite")
        answer = {"mean_logp": min(sum(own) / len(own), 0.0), "tokens": len(own)}
        if self.top_k:
            answer |= {"token_ids": ids[start:], "top": [_top(given[i], self.top_k) for i in range(start, len(ids))]}
        return answer | {"prompt_tokens": start, "finish_reason": "stop"}

    async def prove(self, check: Preflight) -> str:
        """What is found of a probe, as a line to print.

        Raises:
            UserError: the server has no prompt_logprobs or /tokenize, or the template has something between the prompt
                and the answer.
        """

        def refuse(what: str) -> UserError:
            return UserError(f"{self.name}: {check.endpoint.url}: {what}")

        for name in ("prompt_logprobs", "return_token_ids"):
            if check.known and name not in check.known:
                raise refuse(f"knows no {name}: log-probabilities of answers need a vLLM server")
        body = self.whole(PROBE, PROBE_ANSWER)
        prompt = await check.tokenize(of_tokenize(self.body(PROBE, None)))
        bare = await check.tokenize({"model": body["model"], "prompt": PROBE_ANSWER, "add_special_tokens": False})
        if prompt is None or bare is None:
            raise refuse("has no /tokenize: log-probabilities of answers need a vLLM server")
        reply = await check.post(check.endpoint.url + self.path, body)
        try:
            ids, _ = _prompt_of(reply)
            if self.config.kind == "chat":
                still = {"add_generation_prompt": False, "continue_final_message": True}
                opened = await check.tokenize(of_tokenize(body) | still)
                if opened is None or ids[: len(opened["tokens"])] != opened["tokens"]:
                    raise refuse("its template changes an answer when it ends the turn; nothing can be compared")
                self.tail = ids[len(opened["tokens"]) :]
            found = self.values(reply, prompt["tokens"])
        except BadReply as bad:
            raise refuse(str(bad)) from None
        except Refused as refused:
            raise refuse(refused.fault.reason) from None
        between = found["tokens"] - bool(self.tail) - len(bare["tokens"])
        if between > 1:
            advice = "if it is a block of reasoning, switch it off in chat_template_kwargs"
            raise refuse(f"its template puts {between} tokens between the prompt and an answer; {advice}")
        end = f"with the token {self.tail[0]} that ends the turn" if self.tail else "without an end"
        return f"log-probabilities proved: {found['tokens']} tokens of {PROBE_ANSWER!r}, {end}"


def _prompt_of(reply: Any) -> tuple[list[int], list[Any]]:
    """(tokens of the prompt, what is said of each)."""
    choice = (reply.get("choices") or [{}])[0] if isinstance(reply, dict) else {}
    ids = choice.get("prompt_token_ids") or (reply.get("prompt_token_ids") if isinstance(reply, dict) else None)
    given = choice.get("prompt_logprobs") or (reply.get("prompt_logprobs") if isinstance(reply, dict) else None)
    if not given or not ids:
        raise BadReply("gives no prompt_logprobs: log-probabilities of answers need a vLLM server")
    if len(ids) != len(given) or not all(
        str(token) in (entry or ()) for token, entry in zip(ids[1:], given[1:], strict=True)
    ):
        raise BadReply("prompt_logprobs are not those of the prompt's tokens")
    return ids, given


def _common(one: list[int], two: list[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _top(entry: dict[str, Any], k: int) -> list[list[float]]:
    """[[token, log-probability], ...], the likeliest first."""
    ranked = sorted(entry.items(), key=lambda item: -item[1]["logprob"])[:k]
    return [[int(token), round(about["logprob"], 4)] for token, about in ranked]


def _useless(why: str) -> Refused:
    return Refused(Fault("permanent", why, "not_comparable"))
