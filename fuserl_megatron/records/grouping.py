"""Scored responses from disk or the hub, grouped by prompt.

A group is everything recorded for one prompt; groups come in order of first appearance.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from fuserl_megatron.records.files import Reader, rows
from fuserl_megatron.records.format_reader import FormatReader
from fuserl_megatron.records.inputs import FIELDS, IGNORED_FIELDS, OPTIONAL_FIELDS, Place, expand_inputs
from fuserl_megatron.records.messages import MORE_FIELDS, BadRecord, Messages, canonical_tools
from fuserl_megatron.records.records import Rejects, check_record, check_source_mean_logps, decode, number_field
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import file_sha256


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
    reader: Reader | None = None,
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    on_repeated: str = "stop",
) -> LoadedRecords:
    """Read, check and group all records. Everything is held in memory (about the size of the text).

    Args:
        inputs: files (.jsonl, .jsonl.gz, .parquet), globs, or hub names (`owner/name` or `owner/name:split`).
        rejects: what to do with a bad record.
        sources: keep only these sources, in this order of ids; empty keeps all, ids by first appearance.
        watch: wrapped around the rows of each input (a progress bar).
        second_reward: a further field that every record must have, a number like the reward.
        reader: what reads the inputs instead, for files of another form.
        format: how rows are read as records (formats.py).
        fields: where a row has what is called otherwise (format_reader.py).
        on_repeated: what the reward is of a response that comes again: stop (an error where it differs), first, max
            or mean.

    Raises:
        UserError: an input that cannot be read, a bad record under `stop`, a source that never appears, nothing left.
    """
    known = (*FIELDS, *OPTIONAL_FIELDS, *IGNORED_FIELDS)
    if second_reward in known:
        raise UserError(f"second_reward={second_reward}: that field means something else; name one of your own")
    grouping = _Grouping(dict.fromkeys(sources), second_reward, on_repeated)
    loaded, seen = grouping.loaded, grouping.seen
    for name in expand_inputs(inputs, own_reader=reader is not None):
        form = FormatReader(name, format, fields)
        num_before = loaded.counts["records"]
        for place, raw in watch(rows(name, form.needed, ("meta",) if not fields else (), reader)):
            try:
                row = raw if isinstance(raw, dict) else decode(place, raw)
                records = [row] if reader is not None else list(form.records(place, row))
            except BadRecord as bad:
                loaded.counts["records"] += 1
                rejects.add(bad, raw.decode("utf-8", "replace").rstrip() if isinstance(raw, bytes) else raw)
                continue
            for record in records:
                loaded.counts["records"] += 1
                loaded.unknown_keys.update(_unknown_keys(record, (*known, second_reward)))
                try:
                    grouping.add(place, record)
                except BadRecord as bad:
                    rejects.add(bad, record)
        num_records = loaded.counts["records"] - num_before
        sha256 = file_sha256(name) if os.path.exists(name) else None  # a hub data set is covered by the result's own
        read_as = form.format.name if reader is None and form.format is not None else None
        loaded.inputs.append({"name": name, "sha256": sha256, "records": num_records, "format": read_as})
    loaded.groups, loaded.sources = list(grouping.groups.values()), list(grouping.source_ids)
    for name in sources:
        if name not in seen:
            near = get_close_matches(name, sorted(seen), n=1) or sorted(seen)[:5]
            raise UserError(
                f"sources: {name!r} does not appear in the inputs; did you mean {', '.join(near) or 'nothing'}?"
            )
    if not loaded.groups:
        num = loaded.counts["records"]
        raise UserError(f"no usable record in {', '.join(inputs)} ({num} read): each line needs {', '.join(FIELDS)}")
    return loaded


class _Grouping:
    """Records by prompt, in the order in which they come."""

    def __init__(self, sources: Mapping[str, Any], second_reward: str | None, on_repeated: str):
        self.loaded = LoadedRecords([], [], [], Counter(), Counter())
        self.groups: dict[tuple[Messages, str], RecordGroup] = {}
        self.source_ids = {name: i for i, name in enumerate(sources)}
        self.seen: set[str] = set()
        self._only, self._second_reward, self._on_repeated = frozenset(sources), second_reward, on_repeated
        self._times: Counter[tuple[Place, tuple[int, str]]] = Counter()

    def add(self, place: Place, record: dict[str, Any]) -> None:
        """Check a record and put it into its group.

        Raises:
            BadRecord: a field is wrong, or the response was there before with another reward.
        """
        if isinstance(record.get("source"), str):
            self.seen.add(record["source"])
            if self._only and record["source"] not in self._only:
                self.loaded.counts["filtered_by_source"] += 1
                return
        messages, source, response, reward = check_record(place, record)
        logps = check_source_mean_logps(place, record.get("source_mean_logps"))
        prompt = messages, canonical_tools(place, record.get("tools"))
        second, name = None, self._second_reward
        if name is not None:
            second = number_field(place, _with_rewards(record), name, (*FIELDS, name))
        group = self.groups.get(prompt)
        key = (self.source_ids.setdefault(source, len(self.source_ids)), response)
        if group is not None and key in group.responses:
            self._again(group, key, place, reward)
            _same(place, name, second, self.loaded.second_rewards.get(group.responses[key][1]), group.responses[key][1])
            self.loaded.counts["duplicates"] += 1
            return
        group = self.groups.setdefault(prompt, RecordGroup(*prompt))
        group.responses[key] = (reward, place)
        if second is not None:
            self.loaded.second_rewards[place] = second
        if logps:
            group.source_mean_logps[key] = logps

    def _again(self, group: RecordGroup, key: tuple[int, str], place: Place, reward: float) -> None:
        """A response that is there already: what becomes of its reward."""
        earlier, first = group.responses[key]
        if self._on_repeated == "stop":
            _same(place, "reward", reward, earlier, first)
            return
        if self._on_repeated == "max":
            earlier = max(earlier, reward)
        elif self._on_repeated == "mean":
            self._times[first, key] += 1
            earlier += (reward - earlier) / (self._times[first, key] + 1)
        group.responses[key] = (earlier, first)


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


def _unknown_keys(record: dict[str, Any], known: Collection[str | None]) -> set[str]:
    """Keys that nothing reads, those of messages as prompt[].key."""
    unknown = {k for k in record if k not in known}
    if isinstance(record.get("prompt"), list):
        for message in record["prompt"]:
            if isinstance(message, dict) and len(message) > 2:
                theirs = ("role", "content", *MORE_FIELDS.get(str(message.get("role")), ()))
                unknown.update(f"prompt[].{k}" for k in message if k not in theirs and message[k] is not None)
    return unknown


def _with_rewards(record: dict[str, Any]) -> dict[str, Any]:
    """The record with each of the single rewards that `fuserl score` kept as a field, such as rewards.length."""
    single = record.get("rewards")
    return record | {f"rewards.{name}": value for name, value in single.items()} if isinstance(single, dict) else record


def _same(place: Place, name: str | None, value: float | None, earlier: float | None, first: Place) -> None:
    """A duplicate must have the number of the first one, or nobody knows which is meant."""
    if value != earlier:
        what = f"{name} {value} for the same prompt, source and response as {first[0]}:{first[1]}"
        raise BadRecord(place, f"conflicting_{name}", f"{what}, which has {name} {earlier}")
