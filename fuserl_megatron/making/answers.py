"""The answers that are to be scored: directories of `fuserl sample`, or files of records (prompt, source, response).

They are read several times as a stream, always in the same order; what is kept of each in memory are a few numbers.
N answers, P prompts, K sources.
"""

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fuserl_megatron.making.accounting import PLAN
from fuserl_megatron.making.finished import SHARD, account_directories, finished_lines, read_done
from fuserl_megatron.making.parts import key_array, key_of
from fuserl_megatron.records.files import rows
from fuserl_megatron.records.format_reader import FormatReader
from fuserl_megatron.records.inputs import Place, expand_inputs
from fuserl_megatron.records.messages import (
    BadRecord,
    Messages,
    canonical_prompt,
    canonical_tools,
    encodable,
    shown,
    text_field,
)
from fuserl_megatron.records.records import decode
from fuserl_megatron.util.errors import UserError

CUT, EMPTY, REFUSED, DUPLICATE, HELDOUT = 1, 2, 4, 8, 16
"""Flags of an answer."""
FLAGS = {"cut": CUT, "empty": EMPTY, "refused": REFUSED, "duplicate": DUPLICATE, "heldout": HELDOUT}
CUT_REASONS = ("length", "max_tokens", "max_length")
"""What servers call the token limit as the reason for the end of an answer."""
NEEDED = ("prompt", "source", "response")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer with its prompt."""

    key: bytes
    """16 bytes that name it: of the sampling run, or a hash of the whole record."""
    place: Place
    messages: Messages
    """The prompt in one form, whatever form the record has."""
    tools: str
    """JSON text; empty for none."""
    source: str
    response: str
    is_cut: bool
    record: dict[str, Any]
    """As it was read."""


@dataclass
class AnswerTable:
    """What is known of all samples, by position [N]."""

    sources: list[str] = field(default_factory=list)
    num_prompts: int = 0
    keys: np.ndarray = field(default_factory=lambda: key_array(()))
    """16 bytes each."""
    prompt_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    source_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    words: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Length of the answer."""
    flags: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    repeated: Collection[int] = ()
    """Rows of the input that repeat an earlier record word for word: they are no samples."""

    def has(self, flag: int) -> np.ndarray:
        """[N] whether an answer has the flag."""
        return (self.flags & flag) > 0


def read_rows(names: Sequence[str]) -> Iterator[Answer]:
    """All rows of the inputs in their order, those that repeat a record included.

    Raises:
        UserError: no such input, an unfinished directory, a row that is no sample; with file and line.
    """
    for name in names:
        directories, files = _found(name)
        for directory in directories:
            for place, line in finished_lines(directory):
                yield as_answer(place, line)
        for file in files:
            yield from _answers_of(file)


def _found(name: str) -> tuple[list[Path], list[str]]:
    """The directories of `fuserl sample` that are meant, or else files."""
    patterns = (PLAN, f"*/{PLAN}", f"*/{SHARD}*/{PLAN}")
    if os.path.isdir(name) and any(list(Path(name).glob(pattern)) for pattern in patterns):
        return account_directories(name), []
    return [], expand_inputs([name], "samples")


def _answers_of(file: str) -> Iterator[Answer]:
    """Our own records, or rows of any format that `fuserl build` knows (several answers a row in some)."""
    reader = FormatReader(file, fields={"reward": "=0"})  # which is what is to be found
    for place, raw in rows(file, (), unread=()):
        row = raw if isinstance(raw, dict) else decode(place, raw)
        if all(row.get(name) is not None for name in NEEDED):
            yield as_answer(place, row)
            continue
        meta = {"meta": row["meta"]} if row.get("meta") is not None else {}
        for record in reader.records(place, row):
            yield as_answer(place, meta | record)


def check_inputs(names: Sequence[str]) -> None:
    """What is wrong with the inputs before the first is read.

    Raises:
        UserError: as of `read_rows`, but for single rows.
    """
    for name in names:
        for directory in _found(name)[0]:
            read_done(directory)


def answers(names: Sequence[str], table: AnswerTable) -> Iterator[Answer]:
    """The answers of a table, in its order."""
    for i, sample in enumerate(read_rows(names)):
        if i not in table.repeated:
            yield sample


def scan_answers(
    names: Sequence[str],
    refusal_phrases: Sequence[str],
    heldout: frozenset[bytes] | set[bytes] = frozenset(),
    ngram: int = 13,
    watch: Callable[[Iterator], Iterable] = iter,
) -> AnswerTable:
    """Read everything once.

    Args:
        names: directories and files.
        refusal_phrases: beginnings of answers that count as refusals.
        heldout: `heldout_marks` of the prompts that must not be trained on.
        ngram: the size with which these were made.
        watch: wrapped around the rows (a progress bar).
    """
    keys, flags = bytearray(), bytearray()
    prompt_ids, source_ids, words = array("i"), array("i"), array("i")
    prompts: dict[int, int] = {}
    sources: dict[str, int] = {}
    overlapping: set[int] = set()
    seen_keys: set[int] = set()
    seen_texts: set[int] = set()
    repeated = set()
    phrases = tuple(phrase.casefold() for phrase in refusal_phrases)
    for row, sample in enumerate(watch(read_rows(names))):
        key = int.from_bytes(sample.key[:8])
        if key in seen_keys:
            repeated.add(row)
            continue
        seen_keys.add(key)
        prompt = _number(sample.messages, sample.tools)
        if prompt not in prompts and heldout and not heldout.isdisjoint(marks(sample.messages, ngram)):
            overlapping.add(prompt)
        text = _number(prompt, sample.source, sample.response)
        flag = CUT * sample.is_cut | EMPTY * (not sample.response.strip()) | HELDOUT * (prompt in overlapping)
        flag |= REFUSED * _opening(sample.response).startswith(phrases) | DUPLICATE * (text in seen_texts)
        seen_texts.add(text)
        keys += sample.key
        flags.append(flag)
        prompt_ids.append(prompts.setdefault(prompt, len(prompts)))
        source_ids.append(sources.setdefault(sample.source, len(sources)))
        words.append(len(sample.response.split()))
    if not keys:
        raise UserError(f"samples: no answer in {', '.join(names)}: each line needs {', '.join(NEEDED)}")
    numbers = (np.array(column, np.int32) for column in (prompt_ids, source_ids, words))
    table = AnswerTable(list(sources), len(prompts), np.frombuffer(bytes(keys), "S16"), *numbers)
    table.flags, table.repeated = np.frombuffer(bytes(flags), np.uint8), repeated
    return table


def heldout_marks(names: Sequence[str], ngram: int) -> set[bytes]:
    """Hashes of all runs of `ngram` words in the prompts of the files, and of whole prompts."""
    found: set[bytes] = set()
    for name in expand_inputs(names, "heldout"):
        for place, raw in rows(name, ("prompt",), unread=()):
            record = raw if isinstance(raw, dict) else decode(place, raw)
            found |= marks(canonical_prompt(place, record.get("prompt")), ngram)
    return found


def marks(messages: Messages, ngram: int) -> set[bytes]:
    """Of what the user says: hashes of each run of `ngram` words, or of the whole where it is shorter."""
    text = " ".join(part[1] or "" for part in messages if part[0] == "user").casefold()
    words = "".join(c if c.isalnum() else " " for c in text).split()
    runs = [words[i : i + ngram] for i in range(max(1, len(words) - ngram + 1))]
    return {hashlib.sha256(" ".join(run).encode()).digest()[:8] for run in runs if run}


def as_answer(place: Place, raw: bytes | dict[str, Any]) -> Answer:
    """One row as a sample.

    Raises:
        BadRecord: a field is missing or of the wrong type.
    """
    record = raw if isinstance(raw, dict) else decode(place, raw)
    for name in NEEDED:
        if record.get(name) is None:
            what = "is null" if name in record else "is missing"
            raise BadRecord(place, f"missing_{name}", f"field {name!r} {what}: an answer needs {', '.join(NEEDED)}")
    response = record["response"]
    if not isinstance(response, str):
        raise BadRecord(place, "wrong_type_response", f"field 'response' must be a string, not {shown(response)}")
    messages = canonical_prompt(place, record["prompt"])
    source = text_field(place, "source", record["source"])
    tools = canonical_tools(place, record.get("tools"))
    return Answer(
        _key(record), place, messages, tools, source, encodable(place, "response", response), _is_cut(record), record
    )


def _key(record: dict[str, Any]) -> bytes:
    key = record.get("key")
    try:
        if isinstance(key, str) and len(key) == 32:
            return bytes.fromhex(key)
    except ValueError:
        pass
    return key_of(json.dumps(record, sort_keys=True, default=str))


def _is_cut(record: dict[str, Any]) -> bool:
    meta = record.get("meta")
    places = [record, *([meta] if isinstance(meta, dict) else [])]
    return any(place.get("finish_reason") in CUT_REASONS or place.get("truncated") is True for place in places)


def _number(*what: Any) -> int:
    """64 bits that stand for a value; of a million, two share theirs once in ten million runs."""
    return int.from_bytes(key_of(*what)[:8])


def _opening(text: str) -> str:
    return text[:200].strip().casefold().replace("\u2019", "'")


def count_flags(table: AnswerTable) -> Counter[str]:
    """How many answers have each flag."""
    return Counter({name: int(table.has(flag).sum()) for name, flag in FLAGS.items()})
