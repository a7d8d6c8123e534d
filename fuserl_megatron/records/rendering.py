"""A prompt and its responses as text: what the model is given, and what it has to write.

The rule is that of inference. The prompt is the template's rendering of the messages with its generation prompt.
Scored is what follows it in the full rendering (messages and response), up to the stop token (`closing.py`).

Where the full rendering does not begin with the prompt:
- Something is printed for the last turn only (Mistral's system text): the rendering is cut behind the last user turn.
- The generation prompt ends with a block of reasoning that the rendering of an answer lacks. Behind a closed block the
  answer follows. In an open one the reasoning follows, as the record has it; a response without any is refused.

A rendering with a marker as the answer shows what stands in front of an answer and behind it.
"""

import json
from dataclasses import dataclass
from functools import lru_cache

from fuserl_megatron.records.closing import Marks
from fuserl_megatron.records.messages import Messages
from fuserl_megatron.records.templates import BadPrompt, ChatTemplate
from fuserl_megatron.records.thinking import split_block, thinking_at_end, without_opening

MARKER, USER_MARKER = "fuserl0response0marker", "fuserl0user0marker"
PROBE: Messages = (("user", "a"),)


@dataclass(frozen=True)
class RenderedPrompt:
    """The text of a prompt and of what surrounds its responses."""

    messages: Messages
    tools: str
    text: str
    base: str | None
    """The full rendering begins with this; the scored part follows. None: only a rendering that begins with `text`."""
    lead: str
    """What the template prints between `base` and a plain response: scored in front of it (mostly nothing)."""
    after: str
    """The rendered conversation behind the response, ..."""
    closing: str
    """... its part in front of the stop token, ..."""
    stop_id: int
    """... and that token."""


class Renderer:
    """Renders prompts and responses with one template."""

    def __init__(self, template: ChatTemplate | None, marks: Marks):
        """Without a template a prompt is its only message, and a response stands as it is."""
        self.template, self._marks = template, marks
        self._closing = lru_cache(self._find_closing)

    def ask(self, messages: Messages, tools: str = "") -> str:
        """The text of a prompt: what the model is given.

        Raises:
            BadPrompt: the template refuses it, or there is none and it has more than one message.
        """
        if self.template is not None:
            return self.template.render(messages, tools, True)
        if len(messages) > 1 or tools:
            problem = "several messages or tools, but the tokenizer has no chat template: set chat_template"
            raise BadPrompt("needs_chat_template", problem)
        return messages[0][1] or ""

    def surround(self, messages: Messages, tools: str = "", text: str | None = None) -> RenderedPrompt:
        """What stands around a response to a prompt (`text`: its rendering, if there is one already).

        Raises:
            BadPrompt: the template refuses it, leaves tools out, does not print the response or prints it in another
                way than its generation prompt asks for, or nothing ends a turn.
        """
        text = self.ask(messages, tools) if text is None else text
        if self.template is None:
            return RenderedPrompt(messages, tools, text, text, "", "", *self._closing(""))
        self._check_tools(messages, tools, text)
        before, after = self._split((*messages, ("assistant", MARKER)), tools, False, MARKER)
        closing, stop_id = self._closing(after)
        cut, opened = len(text), False
        if not before.startswith(text):
            cut = self._cut_point(messages, tools, text, before)
            block = thinking_at_end(text)
            opened = block is not None and block[0] == "open"
        base = None if opened else before[:cut]
        return RenderedPrompt(messages, tools, text, base, before[cut:], after, closing, stop_id)

    def scored(self, prompt: RenderedPrompt, response: str) -> tuple[str, str | None]:
        """The text that is scored (the stop token comes behind it), and what the template did to the response.

        That is None (nothing), "stripped" (white space around it), "rewrapped" or "cut".

        Raises:
            BadPrompt: the template refuses the response, or the model could not write it behind this prompt.
        """
        if self.template is None:
            return response, None
        full = self.template.render((*prompt.messages, ("assistant", response)), prompt.tools)
        block, end = thinking_at_end(prompt.text), max(0, len(full) - len(prompt.after))
        for base in (prompt.text, prompt.base) if full.endswith(prompt.after) else ():
            if base is not None and full.startswith(base, 0, end):
                printed = full[len(base) : end]
                given = response if block is None else without_opening(response, prompt.text, block[1])
                changed = _change(response, printed) and _change(given, printed.removeprefix(prompt.lead))
                return printed + prompt.closing, changed
        if block is None:
            problem = "the chat template prints this response in a way that cannot be located"
            raise BadPrompt("template_hides_response", problem)
        state, opening, closing = block
        if state == "open" and closing not in response:
            problem = f"the generation prompt opens a block of reasoning ({opening}) that this response does not close"
            raise BadPrompt("reasoning_missing", f"{problem} ({closing}): give the reasoning, or set chat_template")
        if state == "closed" and response.lstrip().startswith(opening):
            problem = f"the generation prompt closes its block of reasoning ({closing}), but this response has one"
            raise BadPrompt("reasoning_not_expected", f"{problem}: set chat_template_kwargs, or take it out")
        given = without_opening(response, prompt.text, opening) if state == "open" else response
        return given + prompt.closing, None

    def _cut_point(self, messages: Messages, tools: str, text: str, before: str) -> int:
        """Where in `before`, the full rendering in front of the response, the scored part begins.

        Only what stands behind the last user message is common to both renderings; a marker as that message shows it.
        """
        last = (*messages[:-1], (messages[-1][0], USER_MARKER, *messages[-1][2:]))
        _, asked = self._split(last, tools, True, USER_MARKER)
        front, _ = self._split((*last, ("assistant", MARKER)), tools, False, MARKER)
        answered = front.rpartition(USER_MARKER)[2]
        if text.endswith(asked) and before.endswith(answered):
            if answered.startswith(asked):
                return len(before) - len(answered) + len(asked)
            header, block = split_block(asked)
            if split_block(answered)[0].rstrip() == header.rstrip():  # but for a block and white space
                return len(before)
            if block and answered.startswith(header):
                return len(before) - len(answered) + len(header)
        ends = f"{text[-20:]!r} is not how it prints an answer, {before[-20:]!r}"
        problem = f"the chat template's generation prompt {ends}; set chat_template"
        raise BadPrompt("generation_prompt_mismatch", problem)

    def _rendered(self, messages: Messages, tools: str, ask: bool) -> str:
        assert self.template is not None
        return self.template.render(messages, tools, ask)

    def _split(self, messages: Messages, tools: str, ask: bool, marker: str) -> tuple[str, str]:
        before, found, after = self._rendered(messages, tools, ask).rpartition(marker)
        if not found:
            whose = "the assistant's response" if marker == MARKER else "the last message as it is"
            raise BadPrompt("template_hides_response", f"the chat template does not print {whose}")
        return before, after

    def _find_closing(self, after: str) -> tuple[str, int]:
        """Text after the response that is scored with it, and the id of the stop token (see `Marks.closing`)."""

        def without_header(after: str) -> str:
            """Without an end that the prompt has too, if that end is gone when another turn follows."""
            if not after or self.template is None:
                return after
            try:
                chat = (*PROBE, ("assistant", MARKER), *PROBE)
                if self.template.render(chat).partition(MARKER)[2].startswith(after):
                    return after
            except BadPrompt:
                return after
            asked = self.template.render(PROBE, "", True)
            return next(after[:i] for i in range(len(after) + 1) if asked.endswith(after[i:]))

        return self._marks.closing(after, without_header)

    def _check_tools(self, messages: Messages, tools: str, text: str) -> None:
        """Tools, tool calls and tools' answers are printed, or the prompt is refused: none is dropped."""
        if tools and self._same_text(messages, "", text):
            raise BadPrompt("tools_not_rendered", "the chat template does not print the field 'tools'")
        for i, (role, content, *more) in enumerate(messages):
            calls = bool(more) and "tool_calls" in json.loads(more[0])
            if calls and self._same_text((*messages[:i], (role, content or ""), *messages[i + 1 :]), tools, text):
                raise BadPrompt("tool_calls_not_rendered", f"the chat template does not print prompt[{i}].tool_calls")
            if role == "tool" and content and self._same_text((*messages[:i], *messages[i + 1 :]), tools, text):
                problem = f"the chat template does not print prompt[{i}], the answer of a tool"
                raise BadPrompt("tool_message_not_rendered", problem)

    def _same_text(self, messages: Messages, tools: str, text: str) -> bool:
        try:
            return self._rendered(messages, tools, True) == text
        except BadPrompt:
            return False


def _change(response: str, printed: str) -> str | None:
    if response == printed:
        return None
    if response.strip() == printed.strip():
        return "stripped"
    return "rewrapped" if "".join(response.split()) in "".join(printed.split()) else "cut"
