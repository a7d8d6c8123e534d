"""Only as much of a long text as its first tokens need: 10 MB are not tokenised to keep 2,048 tokens.

A text may be cut where no token reaches across, whatever follows: between a Latin letter and a space or newline, as no
token of the usual vocabularies has a letter in front of white space (asked of the vocabulary). Merges on one side of
such a place know nothing of the other side. A text without such a place (other scripts, one endless word) is tokenised
at two lengths, and the shorter one counts only if both begin with the same tokens.
"""

import re
from collections.abc import Callable, Iterable

CHARACTERS_PER_TOKEN, MORE_CHARACTERS = 16, 4096
"""Texts up to num_tokens x 16 + 4,096 characters are left alone."""
MORE_TOKENS = 64
PLACE = re.compile(r"[A-Za-z](?=[ \n])")
ACROSS = re.compile("[A-Za-z][ \n\u0120\u010a\u2581]")
"""A token that reaches across such a place, in plain text, byte-level (GPT-2) or SentencePiece spelling."""


class Shortener:
    """Cuts texts for one tokenizer."""

    def __init__(self, ids: Callable[[str], list[int]], vocabulary: Callable[[], Iterable[str]]):
        """`ids` tokenises a text; `vocabulary`, asked at the first long text, gives all tokens as they are spelt."""
        self._ids, self._vocabulary = ids, vocabulary
        self._safe: bool | None = None

    def __call__(self, text: str, num_tokens: int) -> str:
        """The text, or a beginning of it that has the same first `num_tokens` tokens and no fewer."""
        size = num_tokens * CHARACTERS_PER_TOKEN + MORE_CHARACTERS
        while size < len(text):
            cut = self._place(text, size)
            head = text[: cut or size]
            ids = self._ids(head)
            if cut and len(ids) >= num_tokens:
                return head
            if not cut and len(ids) >= num_tokens + MORE_TOKENS:
                longer = text[: 2 * size]
                if self._ids(longer)[:num_tokens] == ids[:num_tokens]:
                    return longer
            size *= 4
        return text

    def _place(self, text: str, size: int) -> int:
        """The last safe place in the second half of text[:size]; 0 without one."""
        if self._safe is None:
            self._safe = not any(map(ACROSS.search, self._vocabulary()))
        if not self._safe:
            return 0
        start = size // 2
        places = [match.end() for match in PLACE.finditer(text[start : size + 1])]
        return start + places[-1] if places else 0
