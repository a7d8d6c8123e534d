"""Records, checked one by one.

A record is {"prompt", "source", "response", "reward"}; docs/data_format.md is the user's view of this file. Every
complaint is one line that begins with `file:line`.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, TextIO

from fuserl_megatron.records.inputs import FIELDS, Place
from fuserl_megatron.records.messages import (
    BadRecord,
    Messages,
    canonical_prompt,
    shown,
    text_field,
)
from fuserl_megatron.util.errors import UserError
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
