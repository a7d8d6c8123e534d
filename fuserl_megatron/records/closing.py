"""The marks of a tokenizer: where generation stops, what closes a turn, and which marks a text holds itself.

Generation stops at the eos token and at the ids that generation_config.json, beside the tokenizer, adds. A template may
print further marks in front of that token (scored: the model has to write them) or behind it (not scored).
"""

import json
import os
import re
from collections.abc import Callable
from typing import Any

from fuserl_megatron.records.templates import BadPrompt
from fuserl_megatron.records.thinking import THINKING_MARKS
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import first_line

GENERATION_CONFIG = "generation_config.json"


class Marks:
    """Special tokens of a tokenizer.

    Attributes:
        special: text -> id of every special token.
        stop: text -> id of the tokens at which generation stops.
        thinking_ids: ids of marks around reasoning, which are at home in a response.
    """

    def __init__(self, tokenizer: Any, directory: str):
        """Read the marks of `tokenizer` (transformers') and generation_config.json of `directory`, if there is one."""
        added = tokenizer.added_tokens_decoder
        special = {t.content: i for i, t in added.items() if t.special}
        special.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.special = {text: i for text, i in special.items() if text}
        self.eos_id: int | None = tokenizer.eos_token_id
        ids = {i for i in (self.eos_id, *_generation_stops(directory)) if i is not None}
        self.stop = {text: i for text, i in self.special.items() if i in ids}
        self.stop |= {added[i].content: i for i in sorted(ids) if i in added and added[i].content}
        self.thinking_ids = frozenset(i for text, i in self.special.items() if text in THINKING_MARKS)
        self.ids = frozenset(self.special.values())
        alarming = sorted((re.escape(t) for t in self.special if t not in THINKING_MARKS), key=len, reverse=True)
        first = "".join(sorted({re.escape(text[0]) for text in self.special}))
        # looking at the first character first makes hundreds of reserved tokens no slower than one
        self._pattern = re.compile(f"(?=[{first}])(?:{'|'.join(alarming)})") if alarming else None

    def inside(self, text: str) -> bool:
        """A text holds a special token (of another kind than marks around reasoning)."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def closing(self, after: str, without_header: Callable[[str], str]) -> tuple[str, int]:
        """What closes a response.

        Args:
            after: what the template prints behind the response.
            without_header: takes the next turn's header off the end of `after`.

        Returns:
            The text between the response and its stop token, and that token's id: the first at which generation stops;
            without one the first special token in front of the next turn's header; without that eos.

        Raises:
            BadPrompt: there is neither a special token nor an eos token.
        """
        for marks in (self.stop, self.special):
            places = [(after.find(text), -len(text), text) for text in marks if text in after]
            if places:
                start, _, text = min(places)
                return after[:start], marks[text]
            if marks is self.stop:
                after = without_header(after)
        if self.eos_id is None:
            problem = "the tokenizer has no eos token and the template ends a turn with no special token: set eos_token"
            raise BadPrompt("no_stop_token", problem)
        return after.rstrip(), self.eos_id


def _generation_stops(directory: str) -> list[int]:
    file = os.path.join(directory, GENERATION_CONFIG)
    if not os.path.isfile(file):
        return []
    try:
        with open(file, encoding="utf-8") as opened:
            value = json.load(opened).get("eos_token_id")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"tokenizer: {file} cannot be read ({first_line(error)})") from None
    ids = value if isinstance(value, list) else [value]
    return [i for i in ids if isinstance(i, int) and not isinstance(i, bool)]
