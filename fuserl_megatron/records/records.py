"""Scored responses from disk or the hub, checked one by one and grouped by prompt.

A record is {"prompt", "source", "response", "reward"}; docs/data_format.md is the user's view of this file. Every
complaint is one line that begins with `file:line`. A group is everything recorded for one prompt; groups come in order
of first appearance.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TextIO

from fuserl_megatron.records.inputs import FIELDS, IGNORED_FIELDS, OPTIONAL_FIELDS, Place, expand_inputs, rows
from fuserl_megatron.records.messages import (
    MORE_FIELDS,
    BadRecord,
    Messages,
    canonical_prompt,
    canonical_tools,
    shown,
    text_field,
)
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import file_sha256
from fuserl_megatron.util.text import first_line


class Rejects:
    """What happens to bad records: `stop` raises the first one, `skip` writes and counts them."""

    def __init__(self, on_bad_record: str, file: TextIO | None = None):
        if on_bad_record not in ("stop", "skip"):
            raise UserError(f"on_bad_record={on_bad_record!r} is unknown: use stop or skip")
        self.skip, self.file = on_bad_record == "skip", file
        self.counts: Counter[str] = Counter()

    def add(self, bad: BadRecord, record: Any) -> None:
        """Raise `bad` with the remedy (stop), or write the record with the reason and count it (skip)."""
        if not self.skip:
            remedy = "correct it, or set on_bad_record=skip to leave such records out and list them in rejected.jsonl"
            raise UserError(f"{bad}; {remedy}") from None
        self.counts[bad.kind] += 1
        if self.file is not None:
            (name, number), reason = bad.place, bad.problem
            line = {"file": name, "line": number, "kind": bad.kind, "reason": reason, "record": record}
            self.file.write(json.dumps(line, default=str) + "\n")


LARGEST_REWARD = 1e100
"""Means and squares of larger ones are infinite."""


@dataclass
class RecordGroup:
    """One prompt with everything recorded for it."""

    messages: Messages
    tools: str = ""
    """JSON text of the tools on offer; empty for none."""
    responses: dict[tuple[int, str], tuple[float, Place]] = field(default_factory=dict)
    """(source id, response text) -> (reward, where it was read), in order of appearance."""
    source_mean_logps: dict[tuple[int, str], dict[str, float]] = field(default_factory=dict)
    """(source id, response text) -> per-token mean log-probability by source name, where the record has it."""


@dataclass
class LoadedRecords:
    """All inputs, grouped, with everything that was counted on the way."""

    groups: list[RecordGroup]
    sources: list[str]
    inputs: list[dict[str, Any]]
    """Per file: name, sha256 (null for a hub data set) and number of records."""
    counts: Counter[str]
    """records, duplicates, filtered_by_source."""
    unknown_keys: Counter[str]
    """Keys that no reader knows -> how many records carried them. They are ignored."""
    second_rewards: dict[Place, float] = field(default_factory=dict)
    """With `second_reward`: where a response was read -> what that field holds."""


def load_groups(
    inputs: Sequence[str],
    rejects: Rejects,
    sources: Sequence[str] = (),
    watch: Callable[[Iterator], Iterable] = iter,
    second_reward: str | None = None,
) -> LoadedRecords:
    """Read, check and group all records. Everything is held in memory (about the size of the text).

    Args:
        inputs: files (.jsonl, .jsonl.gz, .parquet), globs, or hub names (`owner/name` or `owner/name:split`).
        rejects: what to do with a bad record.
        sources: keep only these sources, in this order of ids; empty keeps all, ids by first appearance.
        watch: wrapped around the rows of each input (a progress bar).
        second_reward: a further field that every record must have, a number like the reward.

    Raises:
        UserError: an input that cannot be read, a bad record under `stop`, a source that never appears, nothing left.
    """
    known = (*FIELDS, *OPTIONAL_FIELDS, *IGNORED_FIELDS)
    if second_reward in known:
        raise UserError(f"second_reward={second_reward}: that field means something else; name one of your own")
    source_ids = {name: i for i, name in enumerate(dict.fromkeys(sources))}
    groups: dict[tuple[Messages, str], RecordGroup] = {}
    loaded = LoadedRecords([], [], [], Counter(), Counter())
    seen: set[str] = set()
    for name in expand_inputs(inputs):
        num_before = loaded.counts["records"]
        for place, raw in watch(rows(name)):
            loaded.counts["records"] += 1
            try:
                record = raw if isinstance(raw, dict) else decode(place, raw)
                loaded.unknown_keys.update(_unknown_keys(record, (*known, second_reward)))
                if isinstance(record.get("source"), str):
                    seen.add(record["source"])
                    if sources and record["source"] not in sources:
                        loaded.counts["filtered_by_source"] += 1
                        continue
                messages, source, response, reward = check_record(place, record)
                logps = check_source_mean_logps(place, record.get("source_mean_logps"))
                prompt = messages, canonical_tools(place, record.get("tools"))
                second = None
                if second_reward is not None:
                    second = number_field(place, _with_rewards(record), second_reward, (*FIELDS, second_reward))
                group = groups.get(prompt)
                source_id = source_ids.setdefault(source, len(source_ids))
                key = (source_id, response)
                if group is not None and key in group.responses:
                    earlier, first = group.responses[key]
                    _same(place, "reward", reward, earlier, first)
                    _same(place, second_reward, second, loaded.second_rewards.get(first), first)
                    loaded.counts["duplicates"] += 1
                    continue
                group = groups.setdefault(prompt, RecordGroup(*prompt))
                group.responses[key] = (reward, place)
                if second is not None:
                    loaded.second_rewards[place] = second
                if logps:
                    group.source_mean_logps[key] = logps
            except BadRecord as bad:
                rejects.add(bad, raw.decode("utf-8", "replace").rstrip() if isinstance(raw, bytes) else raw)
        num_records = loaded.counts["records"] - num_before
        sha256 = file_sha256(name) if os.path.exists(name) else None  # a hub data set is covered by the result's own
        loaded.inputs.append({"name": name, "sha256": sha256, "records": num_records})
    for name in sources:
        if name not in seen:
            near = get_close_matches(name, sorted(seen), n=1) or sorted(seen)[:5]
            raise UserError(
                f"sources: {name!r} does not appear in the inputs; did you mean {', '.join(near) or 'nothing'}?"
            )
    if not groups:
        num = loaded.counts["records"]
        raise UserError(f"no usable record in {', '.join(inputs)} ({num} read): each line needs {', '.join(FIELDS)}")
    loaded.groups, loaded.sources = list(groups.values()), list(source_ids)
    return loaded


def _with_rewards(record: dict[str, Any]) -> dict[str, Any]:
    """The record with each of the single rewards that `fuserl score` kept as a field, such as rewards.length."""
    single = record.get("rewards")
    return record | {f"rewards.{name}": value for name, value in single.items()} if isinstance(single, dict) else record


def check_record(place: Place, record: dict[str, Any]) -> tuple[Messages, str, str, float]:
    """One record's (messages, source, response, reward).

    Raises:
        BadRecord: a field is missing, of the wrong type, empty, or not finite; the message names the field.
    """
    for name in FIELDS:
        _check_present(place, record, name, FIELDS)
    source = text_field(place, "source", record["source"])
    response = text_field(place, "response", record["response"])
    reward = number_field(place, record, "reward", FIELDS)
    return canonical_prompt(place, record["prompt"]), source, response, reward


def number_field(place: Place, record: dict[str, Any], name: str, needed: Sequence[str]) -> float:
    """A reward; `needed` are the fields that such a record has, for the message.

    Raises:
        BadRecord: the field is missing, no number, not finite, or so large that its square would not be.
    """
    _check_present(place, record, name, needed)
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecord(place, f"wrong_type_{name}", f"field {name!r} must be a number, not {shown(value)}")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not abs(value) <= LARGEST_REWARD:
        limit = (
            "a finite number" if not math.isfinite(value) else f"at most {LARGEST_REWARD:g} in size (squares overflow)"
        )
        raise BadRecord(place, f"non_finite_{name}", f"field {name!r} is {value}: it must be {limit}")
    return value


def _check_present(place: Place, record: dict[str, Any], name: str, needed: Sequence[str]) -> None:
    if record.get(name) is None:
        what = f"field {name!r} is missing" if name not in record else f"field {name!r} is null"
        raise BadRecord(place, f"missing_{name}", f"{what}: a record needs {', '.join(needed)}")


def _same(place: Place, name: str | None, value: float | None, earlier: float | None, first: Place) -> None:
    """A duplicate must have the number of the first one, or nobody knows which is meant."""
    if value != earlier:
        what = f"{name} {value} for the same prompt, source and response as {first[0]}:{first[1]}"
        raise BadRecord(place, f"conflicting_{name}", f"{what}, which has {name} {earlier}")


def check_source_mean_logps(place: Place, value: Any) -> dict[str, float]:
    """The optional field source_mean_logps: source name -> mean log-probability per token (nats) of this response.

    Raises:
        BadRecord: not an object of numbers <= 0. null, for the whole or for a source, is the same as left out.
    """
    if value is None:
        return {}
    found = {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else None
    if found is None or any(isinstance(v, bool) or not isinstance(v, int | float) for v in found.values()):
        problem = f"field 'source_mean_logps' must be an object of source -> number, not {shown(value)}"
        raise BadRecord(place, "wrong_type_source_mean_logps", problem)
    if not all(-math.inf < v <= 0 for v in found.values()):
        problem = f"field 'source_mean_logps' must hold finite log-probabilities, at most 0, not {shown(value)}"
        raise BadRecord(place, "bad_source_mean_logps", problem)
    return {k: float(v) for k, v in found.items()}


def check_source_names(loaded: LoadedRecords, filtered: bool) -> bool:
    """Whether any record has source_mean_logps.

    Raises:
        UserError: a name there is no source of the data set, and could not be one of those left out (`filtered`).
    """
    found = False
    for group in loaded.groups:
        for key, logps in group.source_mean_logps.items():
            found = True
            unknown = sorted(set(logps) - set(loaded.sources))
            if unknown and not filtered:
                file, line = group.responses[key][1]
                have = f"the sources are {', '.join(loaded.sources)}"
                raise UserError(f"{file}:{line}: field 'source_mean_logps' names {unknown[0]!r}: {have}")
    return found


def decode(place: Place, line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        BadRecord: not UTF-8, not JSON, no object, or a key that stands twice.
    """
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_each_key_once)
    except UnicodeDecodeError as error:
        raise BadRecord(place, "not_utf8", f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
        raise BadRecord(place, "malformed_json", f"not valid JSON ({first_line(error)})") from None
    if not isinstance(record, dict):
        raise BadRecord(place, "malformed_json", f"a record must be a JSON object, not {shown(record)}")
    return record


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a key that stands twice nobody knows which is meant."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def _unknown_keys(record: dict[str, Any], known: Collection[str | None]) -> set[str]:
    """Keys that nothing reads, those of messages as prompt[].key."""
    unknown = {k for k in record if k not in known}
    if isinstance(record.get("prompt"), list):
        for message in record["prompt"]:
            if isinstance(message, dict) and len(message) > 2:
                theirs = ("role", "content", *MORE_FIELDS.get(str(message.get("role")), ()))
                unknown.update(f"prompt[].{k}" for k in message if k not in theirs and message[k] is not None)
    return unknown
