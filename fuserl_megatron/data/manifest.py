"""manifest.json of a fused data set: everything known about it beside the tokens. `build` writes it, once.

The file carries a hash of its own content, so that a changed value is noticed before it decides anything. Format 1 (of
earlier versions) has no such hash, and does not say what the model's tokenizer and template are compared with; format 2
does not say how a temperature came about. Such data sets open as they did, with those fields empty.
"""

import hashlib
import json
import math
import types
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.paths import did_you_mean
from fuserl_megatron.util.text import first_line

FORMAT_VERSION = 3
READABLE = (1, 2, 3)
MANIFEST_FILE, OWN_HASH = "manifest.json", "manifest_hash"
RUN_COPY = "data_manifest.json"
"""The copy in results_dir of the manifest of what a run was trained on: a later export reads it."""
NEW_IN = {
    2: (OWN_HASH, "chat_template", "chat_template_given", "template_kwargs", "end_of_turn_id", "identity"),
    3: ("temperature_rule",),
}
"""Fields that a format brought."""
AGAIN = "build the data set again"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything known about a fused data set. Written once by `build`, never edited."""

    format_version: int
    hash: str
    """sha256 of groups.arrow: the data set's identity."""
    num_bytes: int
    """Size of groups.arrow."""
    sources: list[str]
    """Source ids are indices into this list."""
    reward_temperature: float
    """tau, always the number; with `reward_temperature=auto` the rule's."""
    temperature_rule: dict[str, Any] | None = None
    """What auto worked tau out from (records/temperature.py). None: tau was given, or an earlier format."""
    score_aggregation: str
    reward_standardization: str
    max_length: int
    tokenizer: str
    tokenizer_hash: str
    chat_template_hash: str | None
    """None: the tokenizer has no chat template."""
    chat_template: str | None = None
    """The template's whole text: an exported model carries it. None: none, or format 1."""
    chat_template_given: bool = False
    """The setting chat_template replaced the tokenizer's own."""
    template_kwargs: dict[str, Any] | None = None
    """Arguments that the template was called with. None: format 1."""
    end_of_turn: str
    """The token that ends a response to a one-message prompt."""
    end_of_turn_id: int | None = None
    """Its id, which an exported model stops at. None: format 1."""
    identity: dict[str, Any] | None = None
    """What a model's tokenizer is compared with (identity.py). None: format 1."""
    max_token_id: int
    """The model's vocabulary must be larger than this."""
    num_prompts: int
    num_responses: int
    counts: dict[str, int]
    """Everything dropped, cut or unusual, by name (docs/data_format.md)."""
    rejected: dict[str, int]
    """Bad records left out under on_bad_record=skip, by kind."""
    unknown_keys: dict[str, int]
    """Record fields that nothing reads, by name, with the number of records that carried them."""
    tokens: dict[str, float]
    """Token statistics: totals, means, maxima."""
    per_source: dict[str, dict[str, float]]
    """Source -> responses, prompts, mean_reward, mean_weight, win_rate."""
    effective_number_of_sources: dict[str, float]
    """exp(H(w)) over the prompts: mean, and quantiles by name."""
    inputs: list[dict[str, Any]]
    """Name, sha256 and number of records of every input."""

    def lineage(self) -> dict[str, Any]:
        """What a model card tells of the data; of files the names alone."""
        data = {name: getattr(self, name) for name in ("num_prompts", "num_responses")}
        named = [entry for entry in self.inputs if isinstance(entry.get("name"), str)]
        data |= {
            "reward_temperature": str(self.reward_temperature),
            "files": [Path(entry["name"]).name for entry in named if entry.get("sha256")],
            "hub": [entry["name"].partition(":")[0] for entry in named if not entry.get("sha256")],
        }
        return {
            "sources": list(self.sources),
            "data_set": self.hash,
            "data": data,
            "template_kwargs": self.template_kwargs or {},
        }

    def to_json(self) -> str:
        """The text of manifest.json."""
        values = asdict(self)
        if self.reward_temperature == math.inf:
            values["reward_temperature"] = "inf"  # JSON has no infinity
        return json.dumps(values | {OWN_HASH: _hash_of(values)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def read(cls, directory: str | Path) -> "Manifest":
        """Read and check `directory`/manifest.json.

        Raises:
            UserError: not a fused data set, another format version, or not the file that build wrote.
        """
        path = Path(directory) / MANIFEST_FILE
        if not path.parent.exists() and (near := did_you_mean(path.parent)):
            raise UserError(f"{directory}: no such directory{near}")
        if not path.is_file():
            raise UserError(f"{directory} is not a fused data set (no {MANIFEST_FILE}): make one with `fuserl build`")
        return cls.read_file(path)

    @classmethod
    def read_file(cls, path: Path) -> "Manifest":
        """As `read`, from a copy of the file under any name."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, and what is no UTF-8
            raise UserError(f"{path} is not readable ({first_line(error)}): {AGAIN}") from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if type(version) is not int or version not in READABLE:
            known = ", ".join(map(str, READABLE))
            raise UserError(f"{path}: format version {str(version)[:40]}, this program reads {known}: {AGAIN}")
        later = {name for since, names in NEW_IN.items() if since > version for name in names}
        if odd := sorted(set(values) ^ ({f.name for f in fields(cls)} | {OWN_HASH}) - later):
            raise UserError(f"{path}: fields missing or unknown ({', '.join(odd)[:200]}): {AGAIN}")
        if version > 1 and values.pop(OWN_HASH) != _hash_of(values):
            raise UserError(f"{path}: its content was changed after it was written (hash): copy the file, or {AGAIN}")
        if values["reward_temperature"] == "inf":
            values["reward_temperature"] = math.inf
        for name, kind in typing.get_type_hints(cls).items():
            if name in values and not _is_a(values[name], kind):
                raise UserError(f"{path}: {name} is {str(values[name])[:40]!r}, which cannot be: {AGAIN}")
        if "total_max" not in values["tokens"]:
            raise UserError(f"{path}: tokens holds no total_max: {AGAIN}")
        return cls(**values)


def _hash_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value from JSON has an annotated type; an int is a float, a boolean is neither."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is types.UnionType:
        return any(_is_a(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(item, arguments[1]) for item in value.values())
    if kind is float:
        return type(value) in (int, float) and not math.isnan(value)
    return type(value) is kind
