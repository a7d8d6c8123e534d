"""Chat template and tokenizer: prompt tokens, and exactly the tokens of a response that are scored.

`rendering.py` says what the text of both is; here it becomes tokens. Prompt and response are tokenised separately, as
at inference: no token spans both. Tokenizers that put a space in front of every text (SentencePiece's dummy prefix)
tokenise prompt + response together where that leaves the prompt's tokens as they are.
Nothing is ever masked by token id, so pad == eos does no harm. A tokenizer without a template: prompt + response + eos.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fuserl_megatron.records.closing import Marks
from fuserl_megatron.records.inputs import Place
from fuserl_megatron.records.messages import BadRecord, Messages
from fuserl_megatron.records.rendering import PROBE, RenderedPrompt, Renderer
from fuserl_megatron.records.shorten import Shortener
from fuserl_megatron.records.templates import BadPrompt, ChatTemplate
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.hub import local_model
from fuserl_megatron.util.paths import did_you_mean, export_of_run
from fuserl_megatron.util.text import first_line

PROBES: tuple[Messages, ...] = (
    (("user", "What is 12 + 345?"),),
    (("system", "Answer in French."), ("user", " Gr\u00fc\u00dfe,\n\n\u4e16\u754c \U0001f44b\u200d <b> ")),
    (("user", "Hi"), ("assistant", "Hello!"), ("user", "def f(x):\n    return x  # ok")),
)
PROBE_ANSWER = "It's 357.\n\n- yes\t"
PROBE_DATE = datetime(2000, 1, 2, 3, 4, 5)


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt ready for its responses."""

    rendered: RenderedPrompt
    tokens: list[int]
    special_in_text: bool
    """The messages themselves contain a special token."""
    dated: bool
    """The template has printed the date of the build."""

    @property
    def text(self) -> str:
        """What the model is given."""
        return self.rendered.text


@dataclass(frozen=True)
class TokenizedResponse:
    """The scored tokens of one response."""

    tokens: list[int]
    """Response and end-of-turn token (which a truncated response has lost)."""
    truncated: bool
    special_in_text: bool
    """The response's own text contains a special token (marks around reasoning do not count)."""
    change: str | None
    """What the template did to the text: None, "stripped" (white space around it), "rewrapped" or "cut"."""


def load_tokenizer(path: str) -> tuple[Any, str]:
    """Transformers' tokenizer of a directory or hub name, and the directory.

    Raises:
        UserError: it is no directory, or nothing that transformers can open.
    """
    from transformers import AutoTokenizer

    path = local_model(path, weights=False)
    if not os.path.isdir(path):
        near = did_you_mean(path) or ": give the directory that holds tokenizer.json"
        raise UserError(f"tokenizer: {path} is not a directory{near}")
    if exported := export_of_run(path):
        raise UserError(f"tokenizer: {path} holds none{exported}")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False), path
    except MemoryError:  # no fault of the files
        raise
    except Exception as error:  # transformers raises whatever its many loaders raise
        raise UserError(f"tokenizer: {path} cannot be opened as a tokenizer ({first_line(error)})") from None


class ChatTokenizer:
    """A Hugging Face tokenizer with its chat template (or another one) and a length limit.

    Attributes:
        tokenizer: transformers' tokenizer.
        template: the template's text; None without one.
        template_kwargs: the arguments it is given beside the conversation.
        stop_tokens: text -> id of the tokens at which generation stops.
        max_length: longest prompt + response, in tokens.
    """

    def __init__(
        self,
        path: str,
        chat_template: str | None = None,
        max_length: int = 2048,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        """Load the tokenizer. No code from its directory is run.

        Args:
            path: tokenizer directory (the model directory), or hub name.
            chat_template: jinja file that replaces the tokenizer's own template.
            max_length: longest prompt + response, in tokens.
            chat_template_kwargs: further arguments of the template, such as enable_thinking.

        Raises:
            UserError: no tokenizer there, a template that does not parse or does not print the response, an argument
                that the template does not read, no eos token.
        """
        self.tokenizer, path = load_tokenizer(path)
        self.tokenizer.model_max_length = int(1e30)  # the limit is ours; keeps transformers from warning about its own
        self.max_length, self.template_kwargs = max_length, dict(chat_template_kwargs or {})
        self.template = _template_text(self.tokenizer, path, chat_template)
        self._has_tool_template = chat_template is None and isinstance(self.tokenizer.chat_template, dict)
        self._marks = Marks(self.tokenizer, path)
        self.stop_tokens = self._marks.stop
        self._shorten = Shortener(self._ids, self.tokenizer.get_vocab)
        first = self.tokenizer.convert_ids_to_tokens(self._ids("a")[:1])
        self._dummy_prefix = bool(first) and first[0].startswith("\u2581")
        source = f"tokenizer: {path}"
        if self.template is not None:
            source = f"chat_template: {chat_template or f'the template of {path}'}"
        try:
            self._renderer = Renderer(self._compiled(), self._marks)
            self.end_of_turn = self.tokenizer.convert_ids_to_tokens(self._renderer.surround(PROBE).stop_id)
            """The scored token that ends a response to a plain one-message prompt."""
        except BadPrompt as error:
            raise UserError(f"{source}: {error}") from None

    def _compiled(self, now: datetime | None = None) -> ChatTemplate | None:
        if self.template is None:
            if self.template_kwargs:
                raise UserError("chat_template_kwargs: the tokenizer has no chat template: set chat_template")
            return None
        template = ChatTemplate(self.template, {**self.tokenizer.special_tokens_map, **self.template_kwargs}, now)
        template.check_kwargs(self.template_kwargs)
        return template

    @property
    def hash(self) -> str:
        """Fingerprint of vocabulary, merges, normalisation and special tokens; not of the template or file layout."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        state: dict[str, Any] = {"vocab": self.tokenizer.get_vocab(), "special": self._marks.special}
        if backend is not None:
            state["backend"] = {
                k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")
            }
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    @property
    def template_hash(self) -> str | None:
        """sha256 of the template's text; None without a template."""
        template = self._renderer.template
        return None if template is None else template.hash

    def render_probe(self) -> list[tuple[str, list[int]]]:
        """(text, token ids) of a few fixed conversations: equal for two tokenizers that prepare data alike.

        Prompts and full renderings, under a fixed date. What the template refuses gives the kind of its refusal.
        """
        template = self._compiled(PROBE_DATE)
        texts: list[str] = []
        for messages in PROBES:
            if template is None:
                texts += [messages[-1][1] or "", PROBE_ANSWER]
                continue
            for chat, ask in ((messages, True), ((*messages, ("assistant", PROBE_ANSWER)), False)):
                try:
                    texts.append(template.render(chat, "", ask))
                except BadPrompt as error:
                    texts.append(error.kind)
        return [(text, self._ids(text, add_special_tokens=template is None)) for text in texts]

    def encode_prompt(self, messages: Messages, tools: str = "") -> TokenizedPrompt:
        """Text and tokens of a prompt; `tools` is the JSON text of the tools on offer, empty for none.

        Raises:
            BadPrompt: the template refuses it or leaves a part of it out, it has no tokens, or no room for one response
                token is left.
        """
        template = self._renderer.template
        if tools and self._has_tool_template and "tool_use" in self.tokenizer.chat_template:
            problem = "tools are printed by the tokenizer's template called tool_use: give it as chat_template"
            raise BadPrompt("tools_not_rendered", problem)
        if template is not None:
            template.date_asked = False
        text = self._renderer.ask(messages, tools)
        dated = template is not None and template.date_asked
        head = self._shorten(text, self.max_length)
        tokens = plain = self._ids(head)
        if template is None:
            full = self._ids(head, add_special_tokens=True)
            lead = next((i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain), 0)
            tokens = full[: lead + len(plain)]  # with the bos token of a tokenizer that adds one, never its eos
        if not tokens:
            raise BadPrompt("prompt_without_tokens", "the prompt has no tokens")
        if len(tokens) >= self.max_length:
            size = len(tokens) if head is text else f"more than {self.max_length}"
            limit = f"max_length={self.max_length}"
            raise BadPrompt(
                "prompt_too_long",
                f"the prompt has {size} tokens: no room for a response within {limit}; raise max_length",
            )
        special = any(self._marks.inside(part) for message in messages for part in message[1:] if part)
        return TokenizedPrompt(self._renderer.surround(messages, tools, text), tokens, special, dated)

    def encode_responses(
        self, prompt: TokenizedPrompt, responses: list[tuple[str, Place]]
    ) -> list[TokenizedResponse | BadRecord]:
        """The scored tokens of each (text, place), or what is wrong with it."""
        results: list[Any] = []
        lead, closing = prompt.rendered.lead, prompt.rendered.closing
        for response, place in responses:
            try:
                results.append(self._renderer.scored(prompt.rendered, response))
            except BadPrompt as error:
                results.append(BadRecord(place, error.kind, str(error)))
        room = self.max_length - len(prompt.tokens)
        texts = [self._shorten(r[0], room + 8) for r in results if isinstance(r, tuple)]
        encoded = iter(self._response_ids(prompt, texts))
        templates_own = self._special_in(self._ids(lead + closing)) if lead + closing else Counter()
        for i, (result, (_, place)) in enumerate(zip(results, responses, strict=True)):
            if not isinstance(result, tuple):
                continue
            (text, change), ids = result, next(encoded)
            if not ids or not text[: len(text) - len(closing)].removeprefix(lead).strip():
                problem = "the response has no tokens under this tokenizer"
                results[i] = BadRecord(place, "response_without_tokens", problem)
                continue
            special = bool(self._special_in(ids) - templates_own)
            tokens = [*ids, prompt.rendered.stop_id]
            results[i] = TokenizedResponse(tokens[:room], len(tokens) > room, special, change)
        return results

    def _special_in(self, ids: list[int]) -> Counter[int]:
        """Special tokens other than marks around reasoning."""
        if self._marks.ids.isdisjoint(ids):
            return Counter()
        return Counter(i for i in ids if i in self._marks.ids and i not in self._marks.thinking_ids)

    def _response_ids(self, prompt: TokenizedPrompt, texts: list[str]) -> list[list[int]]:
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

    def _ids(self, text: str | list[str], add_special_tokens: bool = False) -> Any:
        return self.tokenizer(text, add_special_tokens=add_special_tokens, return_attention_mask=False)["input_ids"]


def _template_text(tokenizer: Any, path: str, chat_template: str | None) -> str | None:
    """The text of the template file, or of the tokenizer's own template."""
    if chat_template is not None:
        try:
            return Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat_template: {chat_template} cannot be read ({first_line(error)})") from None
    try:
        return tokenizer.get_chat_template() if tokenizer.chat_template else None
    except ValueError as error:  # several named templates, none called default
        raise UserError(f"tokenizer: {path}: {first_line(error)}; set chat_template to a file") from None
