"""A chat template, rendered exactly as transformers renders it, within limits.

transformers gives the environment (its filters, functions, tags and settings), the special tokens and the rules for
messages; `template_limits` gives the limits. A test compares the output with `apply_chat_template`, text for text.
The date that a template may ask for is the one at which the object was made, so that one build prints one date.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from difflib import get_close_matches
from typing import Any

from jinja2 import meta

from fuserl_megatron.records.messages import Messages, as_dicts
from fuserl_megatron.records.template_account import TemplateLimit, account, charge
from fuserl_megatron.records.template_limits import LimitedEnvironment
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import first_line

MAX_TEMPLATE = 1 << 20
"""Longest template, in characters."""


class BadPrompt(UserError):
    """A prompt none of whose responses can be used; `kind` is the name it is counted under."""

    def __init__(self, kind: str, problem: str):
        super().__init__(problem)
        self.kind = kind


class ChatTemplate:
    """One template with its variables.

    Attributes:
        text: the template.
        date_asked: it has asked for the date since this was last set to False.
    """

    def __init__(self, text: str, variables: Mapping[str, Any], now: datetime | None = None):
        """Compile.

        Args:
            text: the Jinja text.
            variables: special tokens by name (`bos_token`, ...) and the user's chat_template_kwargs.
            now: what `strftime_now` prints; None takes the clock's time.

        Raises:
            BadPrompt: it does not compile, or is too large.
        """
        from transformers.utils import chat_template_utils as theirs

        if len(text) > MAX_TEMPLATE:
            what = f"the chat template has {len(text):,} characters, more than {MAX_TEMPLATE:,}"
            raise BadPrompt("template_error", what)
        self.text, self._variables = text, dict(variables)
        self._now, self.date_asked = now or datetime.now(), False
        self._with_aliases = getattr(theirs, "_alias_reasoning_fields", lambda chat: chat)
        env = LimitedEnvironment.like(theirs._compile_jinja_template("").environment)
        if "strftime_now" in env.globals:
            env.globals["strftime_now"] = self._strftime_now
        try:
            with account(len(text)):
                self._compiled = env.from_string(text)
        except Exception as error:  # jinja: syntax; Python: nesting
            raise _refusal(error) from None

    @property
    def hash(self) -> str:
        """sha256 of the text."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    def render(self, messages: Messages, tools: str = "", add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            messages: the conversation.
            tools: JSON text of the tools the model may call; empty for none.
            add_generation_prompt: end with the header of the assistant's turn.

        Raises:
            BadPrompt: the template refuses the conversation, fails, or exceeds its limits.
        """
        chat = self._with_aliases(as_dicts(messages))
        size = len(tools) + sum(len(part or "") for message in messages for part in message)
        try:
            with account(size):
                return self._compiled.render(
                    messages=chat,
                    tools=json.loads(tools) if tools else None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._variables,
                )
        except Exception as error:  # jinja: undefined names, the template's own raise_exception; anything it calls
            raise _refusal(error) from None

    def _strftime_now(self, format: str) -> str:
        charge(256 * len(format))  # the C library's buffer grows up to this
        self.date_asked = True
        return self._now.strftime(format)

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse arguments that the template does not read.

        Raises:
            UserError: with the name, and the nearest one that the template reads.
        """
        if not kwargs:
            return
        names = meta.find_undeclared_variables(self._compiled.environment.parse(self.text))
        for name in kwargs:
            if name not in names:
                near = get_close_matches(name, sorted(names), n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(f"chat_template_kwargs.{name}: the chat template does not read it{hint}")


def _refusal(error: Exception) -> BadPrompt:
    limit = isinstance(error, TemplateLimit | MemoryError | RecursionError)
    words = "goes on without end" if limit else "refuses the conversation"
    kind = "template_limit" if limit else "template_error"
    return BadPrompt(kind, f"the chat template {words} ({first_line(error)})")
