"""Chat template and tokenizer: prompt tokens, and exactly the tokens of a response that are scored.

The method, step by step, for a prompt (messages) and a response:

1. The template renders the conversation with a marker as the assistant's answer. What stands before the marker is the
   prompt and the assistant's header, what stands after it closes the turn.
2. prompt text = template(messages, add_generation_prompt=True): what the model will be given when it is used. It must
   be the beginning of 1. A template that knows no generation prompt leaves the header out; then all that stands before
   the marker is the prompt (without spaces at its end: they belong to the answer's first word).
3. The conversation is rendered with the real response; between the same beginning and end stands the response as the
   template prints it (many templates strip white space).
4. Scored is what the model has to write after the prompt: the response, the closing text up to the first special token
   of the closing, and that token: the end-of-turn token (`<|im_end|>`, `<|eot_id|>`, `</s>`). What follows it is not
   (a newline, for instance). A closing without a special token is scored without its trailing white space and followed
   by the eos token. What a template prints between generation prompt and answer, the model has to write too.

Prompt and response are tokenised separately, as at inference: no token spans both. Tokenizers that put a space in
front of every text (SentencePiece's dummy prefix) tokenise prompt + response together where that leaves the prompt's
tokens as they are.
Nothing is ever masked by token id, so pad == eos does no harm. A tokenizer without a template: prompt + response + eos.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fuserl_megatron.config.hub import local_model
from fuserl_megatron.config.schema import UserError
from fuserl_megatron.config.words import first_line
from fuserl_megatron.data.inputs import Place
from fuserl_megatron.data.records import BadRecord, Messages

MARKER = "fuserl0response0marker"


class BadPrompt(UserError):
    """A prompt none of whose responses can be used; `kind` is the name it is counted under."""

    def __init__(self, kind: str, problem: str):
        super().__init__(problem)
        self.kind = kind


@dataclass(frozen=True)
class TokenizedResponse:
    """The scored tokens of one response."""

    tokens: list[int]
    """Response and end-of-turn token (which a truncated response has lost)."""
    truncated: bool
    special_in_text: bool
    """The response's own text contains a special token."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt ready for its responses."""

    messages: Messages
    text: str
    tokens: list[int]
    before: str
    """The rendered conversation up to the response ..."""
    after: str
    """... and after it."""
    lead: str
    """The end of `before` that is not in `text`: scored in front of every response (mostly nothing, or a space)."""


class ChatTokenizer:
    """A Hugging Face tokenizer with its chat template (or another one) and a length limit."""

    def __init__(
        self,
        path: str,
        chat_template: str | None = None,
        max_length: int = 2048,
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        """Load the tokenizer. No code from its directory is run.

        Args:
            path: tokenizer directory (the model directory), or hub name.
            chat_template: jinja file that replaces the tokenizer's own template.
            max_length: longest prompt + response, in tokens.
            template_kwargs: arguments that the template is called with, such as enable_thinking.

        Raises:
            UserError: no tokenizer there, a template that does not parse or does not print the response, no eos token.
        """
        from transformers import AutoTokenizer

        path = local_model(path, weights=False)
        if not os.path.isdir(path):
            raise UserError(f"tokenizer: {path} is not a directory: give the directory that holds tokenizer.json")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its many loaders raise
            raise UserError(f"tokenizer: {path} cannot be opened as a tokenizer ({first_line(error)})") from None
        self.tokenizer.model_max_length = int(1e30)  # the limit is ours; keeps transformers from warning about its own
        self.max_length, self.template_kwargs = max_length, dict(template_kwargs or {})
        if chat_template is not None:
            try:
                self.template = Path(chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"chat_template: {chat_template} cannot be read ({first_line(error)})") from None
        else:
            try:
                self.template = self.tokenizer.get_chat_template() if self.tokenizer.chat_template else None
            except ValueError as error:  # several named templates, none called default
                raise UserError(f"tokenizer: {path}: {first_line(error)}; set chat_template to a file") from None
        specials = {t.content: i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        specials.update(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        self._specials = {text: i for text, i in specials.items() if text}
        self._special_ids = frozenset(self._specials.values())
        first = self.tokenizer.convert_ids_to_tokens(self._ids("a")[:1])
        self._dummy_prefix = bool(first) and first[0].startswith("\u2581")
        self._closing = lru_cache(self._closing)
        self.has_generation_prompt = False
        probe: Messages = (("user", "a"),)
        if self.template is not None:
            source = chat_template or f"the template of {path}"
            try:
                self.has_generation_prompt = self._render(probe, True) != self._render(probe, False)
                self._prompt_text(probe, self._surroundings(probe)[0])
            except BadPrompt as error:
                raise UserError(f"chat_template: {source}: {error}") from None
        else:
            self._closing("")  # complains about a missing eos token now

    @property
    def hash(self) -> str:
        """Fingerprint of vocabulary, merges, normalisation and special tokens; not of the template or file layout."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        state: dict[str, Any] = {"vocab": self.tokenizer.get_vocab(), "special": self._specials}
        if backend is not None:
            state["backend"] = {
                k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")
            }
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    @property
    def template_hash(self) -> str | None:
        """sha256 of the template's text; None without a template."""
        return None if self.template is None else hashlib.sha256(self.template.encode()).hexdigest()

    @property
    def end_of_turn(self) -> str:
        """The scored token that ends a response to a plain one-message prompt."""
        after = "" if self.template is None else self._surroundings((("user", "a"),))[1]
        return self.tokenizer.convert_ids_to_tokens(self._closing(after)[1])

    def encode_prompt(self, messages: Messages) -> RenderedPrompt:
        """Text and tokens of a prompt.

        Raises:
            BadPrompt: the template refuses it, it has no tokens, or it leaves no room for one response token.
        """
        if self.template is None:
            if len(messages) > 1:
                raise BadPrompt(
                    "needs_chat_template", "several messages, but the tokenizer has no chat template: set chat_template"
                )
            text, before, after = messages[0][1], messages[0][1], ""
            plain, full = self._ids(text), self._ids(text, add_special_tokens=True)
            lead = next((i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain), 0)
            tokens = full[: lead + len(plain)]  # with the bos token of a tokenizer that adds one, never its eos
        else:
            before, after = self._surroundings(messages)
            text = self._prompt_text(messages, before)
            tokens = self._ids(text)
        if not tokens:
            raise BadPrompt("prompt_without_tokens", "the prompt has no tokens")
        if len(tokens) >= self.max_length:
            limit = f"max_length={self.max_length}"
            raise BadPrompt(
                "prompt_too_long",
                f"the prompt has {len(tokens)} tokens: no room for a response within {limit}; raise max_length",
            )
        return RenderedPrompt(messages, text, tokens, before, after, before[len(text) :])

    def encode_responses(
        self, prompt: RenderedPrompt, responses: list[tuple[str, Place]]
    ) -> list[TokenizedResponse | BadRecord]:
        """The scored tokens of each (text, place), or what is wrong with it."""
        results: list[TokenizedResponse | BadRecord | str] = []
        for response, place in responses:
            try:
                results.append(self._printed(prompt, response))
            except BadPrompt as error:
                results.append(BadRecord(place, error.kind, str(error)))
        closing, end = self._closing(prompt.after)
        texts = [r for r in results if isinstance(r, str)]
        encoded = iter(self._response_ids(prompt, [prompt.lead + t + closing for t in texts]))
        room = self.max_length - len(prompt.tokens)
        for i, (result, (_, place)) in enumerate(zip(results, responses, strict=True)):
            if not isinstance(result, str):
                continue
            ids = next(encoded)
            if not ids or not result.strip():
                results[i] = BadRecord(
                    place, "response_without_tokens", "the response has no tokens under this tokenizer"
                )
                continue
            special = not self._special_ids.isdisjoint(ids)
            tokens = [*ids, end]
            results[i] = TokenizedResponse(tokens[:room], len(tokens) > room, special)
        return results

    def _printed(self, prompt: RenderedPrompt, response: str) -> str:
        """The response as the template prints it."""
        if self.template is None:
            return response
        full = self._render((*prompt.messages, ("assistant", response)), False)
        size = len(full) - len(prompt.before) - len(prompt.after)
        if size < 0 or not full.startswith(prompt.before) or not full.endswith(prompt.after):
            raise BadPrompt(
                "template_hides_response", "the chat template prints this response in a way that cannot be located"
            )
        return full[len(prompt.before) : len(prompt.before) + size]

    def _response_ids(self, prompt: RenderedPrompt, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids = self._ids(texts)
        if self._dummy_prefix:
            start = len(prompt.tokens)
            special = self.template is None
            joint = self._ids([prompt.text + t for t in texts], add_special_tokens=special)
            for i, tokens in enumerate(joint):
                if (
                    special
                    and tokens[-1:] == [self.tokenizer.eos_token_id]
                    and not texts[i].endswith(self.tokenizer.eos_token)
                ):
                    tokens = tokens[:-1]
                if tokens[:start] == prompt.tokens and len(tokens) > start:
                    ids[i] = tokens[start:]
        return ids

    def _surroundings(self, messages: Messages) -> tuple[str, str]:
        """What the template prints before and after the assistant's answer."""
        full = self._render((*messages, ("assistant", MARKER)), False)
        before, found, after = full.rpartition(MARKER)
        if not found:
            raise BadPrompt("template_hides_response", "the chat template does not print the assistant's response")
        return before, after

    def _prompt_text(self, messages: Messages, before: str) -> str:
        """What the model is given: a beginning of `before`."""
        text = self._render(messages, True)
        if self.has_generation_prompt:
            if not before.startswith(text):
                ends = f"{text[-20:]!r} is not how it prints an answer, {before[-20:]!r}"
                raise BadPrompt(
                    "generation_prompt_mismatch", f"the chat template's generation prompt {ends}; set chat_template"
                )
            return text
        bare = before.rstrip(" ")
        return text if before.startswith(text) and len(text) > len(bare) else bare

    def _closing(self, after: str) -> tuple[str, int]:
        """Text after the response that is scored with it, and the id of the end-of-turn token."""
        places = [(after.find(text), -len(text), text) for text in self._specials if text in after]
        if places:
            start, _, text = min(places)
            return after[:start], self._specials[text]
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "tokenizer: it has no eos token and the template ends a turn with no special token: set eos_token"
            )
        return after.rstrip(), self.tokenizer.eos_token_id

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        try:
            return self.tokenizer.apply_chat_template(
                chat,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.template_kwargs,
            )
        except Exception as error:  # jinja: syntax, undefined names, the template's own raise_exception
            raise BadPrompt(
                "template_error", f"the chat template refuses the conversation ({first_line(error)})"
            ) from None

    def _ids(self, text: str | list[str], add_special_tokens: bool = False) -> Any:
        return self.tokenizer(text, add_special_tokens=add_special_tokens, return_attention_mask=False)["input_ids"]
