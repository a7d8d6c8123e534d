"""Prompts that are also in a test set: found by runs of words they share, as published decontaminations do it."""

import re
from collections.abc import Iterator, Sequence

from fuserl_megatron.making.prompts import Prompt, PromptList

WORDS = 13
"""Length of the runs; a shorter text is one run by itself."""


class HeldOut:
    """The runs of words in all prompts of some files."""

    def __init__(self, inputs: Sequence[str]):
        """Raises UserError: a file that cannot be read."""
        prompts = PromptList(inputs, key="held_out")
        self._runs = {run for prompt in prompts.all() for run in _runs(prompt)}

    def shares(self, prompt: Prompt) -> bool:
        """Whether a prompt has a run of words with them in common."""
        return any(run in self._runs for run in _runs(prompt))


def _runs(prompt: Prompt) -> Iterator[int]:
    """Hashes of the runs, of what the user says: a system message is often the same everywhere."""
    text = " ".join(content or "" for role, content, *_ in prompt.messages if role == "user")
    words = re.findall(r"\w+", text.lower())
    for start in range(max(len(words) - WORDS, 0) + 1):
        yield hash(tuple(words[start : start + WORDS]))
