"""The prompts of a run: read twice, once to know which there are and once to ask, and never held in memory.

A row is {"prompt": text or messages, "meta": anything}. Prompts are told apart by the hash of their messages, never by
their place: a file may be sorted anew or grow between two runs. A prompt that stands twice is one prompt.
"""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fuserl_megatron.making.parts import key_of
from fuserl_megatron.records.files import rows
from fuserl_megatron.records.inputs import Place, expand_inputs
from fuserl_megatron.records.messages import BadRecord, Messages, canonical_prompt
from fuserl_megatron.records.records import decode
from fuserl_megatron.util.errors import UserError

NUM_LONGEST = 3


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    number: int
    """Its place among the different prompts, from 0."""
    id: str
    """Hash of its messages, 32 hexadecimal digits."""
    given: Any
    """As the file has it: a text, or a list of messages."""
    messages: Messages
    meta: Any
    place: Place

    @property
    def num_characters(self) -> int:
        """Length of all its messages."""
        return sum(len(content or "") for _, content, *_ in self.messages)


class PromptList:
    """Every prompt of a run by its hash.

    Attributes:
        ids: [prompts] of 16 bytes, in order of first appearance.
        longest: the prompts with the most characters, the longest first.
        num_characters: of all prompts together.
        counts: rows, duplicates, overlapping, other_shards, skipped (and bad_KIND for each kind of bad record),
            ignored_FIELD.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        on_bad_record: str = "stop",
        refuse: Callable[[Prompt], str | None] | None = None,
        is_left_out: Callable[[Prompt], bool] = lambda prompt: False,
        shard: tuple[int, int] = (0, 1),
    ):
        """Read all of them once.

        Args:
            inputs: files, globs, hub names.
            on_bad_record: stop or skip.
            refuse: says what is wrong with a prompt that is a good one otherwise, or None.
            is_left_out: whether it is to be left out and counted as `overlapping`.
            shard: (number, of how many): the part of the prompts, by their hash, that is taken. It may be empty.

        Raises:
            UserError: an input that cannot be read, a bad record under on_bad_record=stop, or no prompt at all.
        """
        self.names = expand_inputs(inputs, "prompts")
        self.counts: Counter[str] = Counter()
        ids, lengths, usable, longest = bytearray(), array("q"), bytearray(), {}
        for name in self.names:
            for place, raw in rows(name, needed=("prompt",), unread=()):
                self.counts["rows"] += 1
                try:
                    prompt = self._prompt(place, raw, -1)
                    if problem := refuse(prompt) if refuse else None:
                        raise BadRecord(place, "refused", problem)
                except BadRecord as bad:
                    if on_bad_record == "stop":
                        remedy = "correct it, or leave such prompts out with on_bad_record=skip"
                        raise UserError(f"{bad}; {remedy}") from None
                    self.counts.update(("skipped", f"bad_{bad.kind}"))
                    usable.append(False)
                    continue
                left_out = "overlapping" if is_left_out(prompt) else ""
                if int(prompt.id[:12], 16) % shard[1] != shard[0]:
                    left_out = "other_shards"
                usable.append(not left_out)
                if left_out:
                    self.counts[left_out] += 1
                    continue
                ids += bytes.fromhex(prompt.id)
                lengths.append(prompt.num_characters)
                longest[prompt.id] = prompt
                if len(longest) > NUM_LONGEST:
                    longest.pop(min(longest, key=lambda key: longest[key].num_characters))
        if not ids and not self.counts["other_shards"]:
            raise UserError(f"{', '.join(inputs)}: no usable prompt ({self.counts['rows']} rows read)")
        found = np.frombuffer(bytes(ids), "S16")
        first = np.sort(np.unique(found, return_index=True)[1])
        self.counts["duplicates"] = len(found) - len(first)
        self.ids = found[first]
        self.num_characters = int(np.frombuffer(lengths, np.int64)[first].sum())
        self.longest = sorted(longest.values(), key=lambda prompt: -prompt.num_characters)
        self._numbers = np.full(len(usable), -1, np.int32)  # of each row; -1 for one that is left out
        self._numbers[np.flatnonzero(np.frombuffer(usable, bool))[first]] = np.arange(len(first), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, wanted: np.ndarray) -> Iterator[Prompt]:
        """The prompts whose number `wanted` [prompts] says yes to, in order.

        Raises:
            UserError: a file has other prompts than before.
        """
        numbers = iter(self._numbers.data)  # one by one as plain ints
        for name in self.names:
            for place, raw in rows(name, needed=("prompt",), unread=()):
                number = next(numbers, None)
                if number is not None and (number < 0 or not wanted[number]):
                    continue
                prompt = None if number is None else self._prompt(place, raw, number)
                if (
                    number is None
                    or prompt is None
                    or bytes.fromhex(prompt.id) != self.ids[number : number + 1].tobytes()
                ):
                    raise UserError(f"{place[0]}:{place[1]}: changed since the start; type the same command again")
                yield prompt

    def _prompt(self, place: Place, raw: bytes | dict[str, Any], number: int) -> Prompt:
        record = raw if isinstance(raw, dict) else decode(place, raw)
        if "prompt" not in record:
            raise BadRecord(place, "missing_prompt", f"field 'prompt' is missing (there is: {', '.join(record)})")
        messages = canonical_prompt(place, record["prompt"])
        if record.get("tools"):
            raise BadRecord(place, "tools", "field 'tools': sources are asked for text, not for calls of tools")
        meta = record.get("meta")
        if meta is not None:
            try:
                json.dumps(meta, allow_nan=False)
            except (TypeError, ValueError, RecursionError):
                problem = "field 'meta' holds something that JSON cannot (a date, NaN): make it text"
                raise BadRecord(place, "wrong_type_meta", problem) from None
        if number < 0 and len(record) > 1:
            self.counts.update(f"ignored_{name}" for name in record if name not in ("prompt", "meta", "tools"))
        return Prompt(number, key_of(*messages).hex(), record["prompt"], messages, meta, place)
