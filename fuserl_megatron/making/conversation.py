"""A prompt with its answer as tokens of a reward model: its own chat template, and just the BOS that this prints."""

from datetime import datetime
from pathlib import Path
from typing import Any

from fuserl_megatron.records.messages import Messages
from fuserl_megatron.records.templates import BadPrompt, ChatTemplate
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import first_line

DATE = datetime(2024, 7, 26)
"""What a template that asks for the date is told: a reward must not depend on the day."""


class Unscorable(ValueError):
    """A row that gets no value; the message says why."""


class Conversation:
    """The tokenizer and the template of one reward model.

    Attributes:
        template_hash: sha256 of the template.
        bos_left_out: the tokenizer would put a BOS in front of plain text, and the template prints none.
    """

    def __init__(self, where: str, directory: str, chat_template: str | None):
        """Load; `where` names the reward in messages.

        Raises:
            UserError: no tokenizer or template there, or a template that prints two BOS.
        """
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its many loaders raise
            raise UserError(f"{where}: {directory} has no readable tokenizer ({first_line(error)})") from None
        self.tokenizer.model_max_length = int(1e30)  # the limit is ours
        text = self._template_text(where, directory, chat_template)
        try:
            self._template = ChatTemplate(text, self.tokenizer.special_tokens_map, DATE)
            probe = self.text((("user", "Hi"),), "Hello")
        except (BadPrompt, Unscorable) as error:
            raise UserError(f"{where}: {error}") from None
        self.template_hash = self._template.hash
        bos, ids = self.tokenizer.bos_token_id, self.ids(probe)
        if bos is not None and ids[:2] == [bos, bos]:
            raise UserError(f"{where}: the chat template prints two BOS; set chat_template to a corrected file")
        added = self.tokenizer("a", return_attention_mask=False)["input_ids"][:1] == [bos]
        self.bos_left_out = bos is not None and added and ids[:1] != [bos]

    def text(self, messages: Messages, response: str, tools: str = "") -> str:
        """Prompt and answer as the model was trained to see them.

        Raises:
            Unscorable: the template refuses the conversation.
        """
        try:
            return self._template.render((*messages, ("assistant", response)), tools)
        except BadPrompt as error:
            raise Unscorable(str(error)) from None

    def ids(self, text: str) -> list[int]:
        """Tokens; the text has its special tokens already, so none are added."""
        return self.tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def _template_text(self, where: str, directory: str, chat_template: str | None) -> str:
        if chat_template is not None:
            try:
                return Path(chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"{where}.chat_template={chat_template}: cannot be read ({first_line(error)})"
                ) from None
        own: Any = self.tokenizer.chat_template
        if not own:
            raise UserError(f"{where}: {directory} has no chat template; set {where}.chat_template to a Jinja file")
        try:
            return self.tokenizer.get_chat_template()
        except ValueError as error:  # several named templates, none called default
            raise UserError(f"{where}: {first_line(error)}; set {where}.chat_template to a file") from None
