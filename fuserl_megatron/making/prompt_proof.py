"""Is the prompt that a source's server makes the one its tokenizer makes? Compared token by token where that can be."""

import dataclasses
from pathlib import Path
from typing import Any

from fuserl_megatron.config.sample_sections import SourceConfig
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import first_line

NEEDS_BOS = ("gemma",)
"""Families whose models answer nonsense without a begin-of-text token, beginnings of model_type: a tokenizer of theirs
that adds none has lost it on the way."""


@dataclasses.dataclass
class Tokens:
    """What a server tells of the probe; None is what it does not."""

    body: dict[str, Any]
    """The request."""
    count: int | None
    """Tokens of the prompt, as it counted them."""
    ids: list[int] | None = None
    """The prompt itself."""
    bos: int | None = None
    """The token its tokenizer puts in front of a text."""
    with_generation_prompt: list[int] | None = None
    without: list[int] | None = None
    """The conversation rendered for an answer to follow, and as it is."""
    context: int | None = None
    """Tokens that a prompt and its answer may have together."""


class SourceTokenizer:
    """The source's own tokenizer, from its directory or the hub."""

    def __init__(self, tokenizer: Any, family: str):
        self.tokenizer = tokenizer
        self.needs_bos = family.startswith(NEEDS_BOS)

    def ids(self, body: dict[str, Any]) -> list[int]:
        """The prompt of a request as this tokenizer has it."""
        if "prompt" in body:
            return self.tokenizer(body["prompt"])["input_ids"]
        text = self.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=True, **body.get("chat_template_kwargs", {})
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def shown(self, ids: list[int]) -> str:
        """The last tokens as text."""
        return repr(self.tokenizer.decode(ids[-8:]))


def load_tokenizer(config: SourceConfig) -> SourceTokenizer | None:
    """The tokenizer the settings name, or the model directory's; None without one.

    Raises:
        UserError: it is named and cannot be opened.
    """
    name = config.tokenizer or (config.model if Path(config.model, "tokenizer_config.json").is_file() else None)
    if name is None:
        return None
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises a dozen unrelated classes; all mean that there is no tokenizer
        raise UserError(f"{config.name}: tokenizer={name}: cannot be opened ({first_line(error)})") from None
    try:
        family = AutoConfig.from_pretrained(name).model_type
    except Exception:  # a directory of the tokenizer alone
        family = "gemma" if "gemma" in type(tokenizer).__name__.lower() else ""
    if config.kind == "chat" and not tokenizer.chat_template:
        raise UserError(
            f"{config.name}: {name} has no chat template, so it is a base model: ask it with kind=completion"
        )
    return SourceTokenizer(tokenizer, family)


class Proof:
    """Compares; a context object only for the settings and the tokenizer."""

    def __init__(self, config: SourceConfig, tokenizer: SourceTokenizer | None):
        self.config, self.tokenizer = config, tokenizer

    def check(self, tokens: Tokens) -> str:
        """What is proved, as a line to print.

        Raises:
            UserError: the prompt is not what it should be.
        """
        expected = None if self.tokenizer is None else self.tokenizer.ids(tokens.body)
        bos = self._bos(tokens)
        if tokens.ids is None:
            return self._compare_counts(tokens.count, expected)
        leading = _leading(tokens.ids, bos)
        if leading > 1 or (bos is None and len(tokens.ids) > 1 and tokens.ids[0] == tokens.ids[1]):
            where = "prompt_format" if self.config.kind == "completion" else "the server's chat template"
            self._refuse(f"the prompt begins with two begin-of-text tokens ({tokens.ids[:4]}); take one out of {where}")
        if leading == 0 and self._wants_bos(expected, bos):
            remedy = "correct its tokenizer (add_bos_token), or set bos=none if the model has none"
            self._refuse(f"the prompt begins without the begin-of-text token ({tokens.ids[:4]} ...); {remedy}")
        if leading and self.config.bos == "none":
            self._refuse(f"the prompt begins with the begin-of-text token {bos}, and bos=none says it must not")
        rendered = tokens.with_generation_prompt
        if rendered and rendered != tokens.without and tokens.ids == tokens.without:
            self._refuse("the prompt ends without the template's generation prompt: the model would go on as the user")
        if expected is not None and tokens.ids != expected:
            self._refuse(self._difference(tokens.ids, expected))
        begins = "with one begin-of-text token" if leading else "without a begin-of-text token"
        how = "as the source's tokenizer has it" if expected is not None else "as the server tells it"
        return f"prompt proved {how}: {len(tokens.ids)} tokens, begins {begins}"

    def _compare_counts(self, count: int | None, expected: list[int] | None) -> str:
        if count is None or expected is None:
            return "prompt not proved: the server does not give its tokens; tokenizer=... would compare their number"
        if count != len(expected):
            more = count - len(expected)
            hint = {1: " (a begin-of-text token too many?)", -1: " (a begin-of-text token lost?)"}.get(more, "")
            counted = f"the server counts {count} tokens in a prompt that has {len(expected)} with its tokenizer"
            self._refuse(f"{counted}{hint}: another template or tokenizer; correct the server, or tokenizer")
        if self._wants_bos(expected, self._own_bos()) and _leading(expected, self._own_bos()) != 1:
            self._refuse("its tokenizer does not begin a prompt with one begin-of-text token, which the model needs")
        return f"prompt proved by its number of tokens alone ({count})"

    def _bos(self, tokens: Tokens) -> int | None:
        own = self._own_bos()
        return tokens.bos if own is None else own

    def _own_bos(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.tokenizer.bos_token_id

    def _wants_bos(self, expected: list[int] | None, bos: int | None) -> bool:
        if self.config.bos != "auto":
            return self.config.bos == "one"
        if self.tokenizer is not None and self.tokenizer.needs_bos:
            return True
        if expected is not None:
            return _leading(expected, bos) > 0
        return bos is not None

    def _difference(self, ids: list[int], expected: list[int]) -> str:
        assert self.tokenizer is not None  # expected ids are this tokenizer's
        shown = self.tokenizer.shown
        if ids == expected[: len(ids)]:
            missing = repr(self.tokenizer.tokenizer.decode(expected[len(ids) :]))
            return f"the server's prompt lacks the end of the template, {missing}: add the generation prompt"
        ends = f"ends with {shown(ids)} at the server and with {shown(expected)} with its tokenizer"
        return f"the prompt differs ({len(ids)} and {len(expected)} tokens; {ends}): another template or tokenizer"

    def _refuse(self, what: str) -> None:
        raise UserError(f"{self.config.name}: {what}")


def _leading(ids: list[int], token: int | None) -> int:
    """How many times a token stands at the beginning."""
    return next((i for i, found in enumerate(ids) if found != token), len(ids))
