"""Values of all rewards and the answers, joined: one reward an answer, and the records that `fuserl build` reads.

N answers of the sample table.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fuserl_megatron.config.keys import leaves
from fuserl_megatron.config.score_sections import CombineConfig, PolicyConfig, Reward, ScoreConfig
from fuserl_megatron.making.answers import CUT, DUPLICATE, EMPTY, HELDOUT, REFUSED, AnswerTable, answers
from fuserl_megatron.making.finished import finished_rows
from fuserl_megatron.making.rewards import judges
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import sync

RECORDS = "records.jsonl"
CARRIED = ("tools", "source_mean_logps", "meta")
"""Fields of a sample that go into the record as they are."""


@dataclass
class Values:
    """What the rewards say, by name of a reward or of a part, [N] each; NaN where there is no value."""

    rewards: dict[str, np.ndarray] = field(default_factory=dict)
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    errors: dict[str, Counter[str]] = field(default_factory=dict)
    """Reward -> kind of error -> rows."""
    logps: dict[str, np.ndarray] = field(default_factory=dict)
    """Source -> mean log-probabilities."""


def needed(table: AnswerTable, config: ScoreConfig, rewards: Mapping[str, Reward]) -> tuple[np.ndarray, dict[str, int]]:
    """[N] which answers become records as far as can be said without a reward, and why the others do not.

    Raises:
        UserError: an empty answer under policy.empty=stop, or nothing is left.
    """
    policy = config.policy
    truncated = truncated_policy(policy, rewards)
    if policy.empty == "stop" and table.has(EMPTY).any():
        raise UserError(
            f"policy.empty=stop: {int(table.has(EMPTY).sum())} answers are empty; policy.empty=drop leaves them out"
        )
    reasons = {"empty": EMPTY}  # in this order: an answer is counted once
    reasons |= {"truncated": CUT} if truncated == "drop" else {}
    reasons |= {"refused": REFUSED} if policy.refused == "drop" else {}
    reasons |= {"heldout": HELDOUT} if config.heldout_action == "drop" else {}
    reasons |= {"duplicated": DUPLICATE} if policy.duplicated == "drop" else {}
    keep, dropped = np.ones(len(table.keys), bool), {}
    for name, flag in reasons.items():
        has = table.has(flag) & keep
        dropped[name] = int(has.sum())
        keep &= ~has
    if not keep.any():
        why = ", ".join(f"{name} {number}" for name, number in dropped.items() if number)
        raise UserError(f"samples: every answer is left out by policy ({why}); see docs/scoring.md")
    return keep, dropped


def truncated_policy(policy: PolicyConfig, rewards: Mapping[str, Reward]) -> str:
    """What auto means for these rewards."""
    if policy.truncated != "auto":
        return policy.truncated
    return "drop" if any(judges(reward) for reward in rewards.values()) else "keep"


def read_values(directories: Mapping[str, Path], keep: np.ndarray, parts: Sequence[str] = ()) -> Values:
    """The values of finished rewards, in the order of the samples.

    Args:
        directories: reward -> where its rows are; one row for each answer in `keep`.
        keep: [N] the answers that were scored.
        parts: names REWARD.PART that are wanted, too.
    """
    values, places = Values(), np.flatnonzero(keep)
    for name, directory in directories.items():
        column = values.rewards[name] = np.full(len(keep), np.nan)
        wanted = {part: np.full(len(keep), np.nan) for part in parts if part.startswith(f"{name}.")}
        values.parts |= wanted
        errors = values.errors[name] = Counter()
        for i, row in zip(places, finished_rows(directory), strict=True):
            if "error" in row:
                errors[error_kind(row["error"])] += 1
                continue
            column[i] = row["value"]
            for part, numbers in wanted.items():
                numbers[i] = row.get("parts", {}).get(part.removeprefix(f"{name}."), np.nan)
        for part, numbers in wanted.items():
            if np.isnan(numbers[keep]).all():
                raise UserError(f"combine.weights.{part}: reward {name} has no such part")
    return values


def error_kind(text: str) -> str:
    """The beginning of an error without its numbers: what rows with the same trouble have in common."""
    return re.sub(r"\d+(\.\d+)?", "N", text).partition(":")[0][:60] if not text.startswith("HTTP") else text[:8]


def combined(
    values: Values, table: AnswerTable, keep: np.ndarray, combine: CombineConfig, policy: PolicyConfig, truncated: str
) -> tuple[np.ndarray, int]:
    """([N] rewards, NaN where an answer has none, how many lost theirs through a failure).

    Raises:
        UserError: a weight of nothing, a product that is no number, a failure under policy.failed=stop.
    """
    weights = weights_of(combine, values)
    numbers = {name: column.copy() for name, column in (values.rewards | values.parts).items() if name in weights}
    failed = keep & np.any([np.isnan(column) for column in numbers.values()], axis=0)
    if failed.any() and policy.failed == "stop":
        raise UserError(f"policy.failed=stop: {int(failed.sum())} answers have no value of some reward; see the report")
    if policy.failed == "value":
        for column in numbers.values():
            column[keep & np.isnan(column)] = policy.failed_value
        failed[:] = False
    keep = keep & ~failed
    total = np.zeros(len(keep)) if combine.method == "sum" else np.ones(len(keep))
    for name, column in numbers.items():
        column = standardized(column, keep, combine.standardize, table.prompt_ids)
        if combine.method == "sum":
            total += weights[name] * column
        elif (column[keep] < 0).any():
            lowest = np.nanmin(column[keep])
            raise UserError(
                f"combine.method=product: reward {name} goes down to {lowest:g}; a product needs values >= 0, use sum"
            )
        else:
            total *= np.where(keep, column, 1.0) ** weights[name]
    for flag, action, penalty in (
        (CUT, truncated, policy.truncated_penalty),
        (REFUSED, policy.refused, policy.refused_penalty),
    ):
        total -= penalty * table.has(flag) * (action == "penalty")
    total[~keep] = np.nan
    if not np.isfinite(total[keep]).all():
        raise UserError("combine: the combined reward of some answers is not finite; look at weights and values")
    return total, int(failed.sum())


def weights_of(combine: CombineConfig, values: Values) -> dict[str, float]:
    """The weight of every reward and part that counts.

    Raises:
        UserError: none does.
    """
    weights = {name: 1.0 for name in values.rewards} | {name: float(w) for name, w in leaves(combine.weights)}
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        raise UserError("combine.weights: all are 0; give one reward a weight.")
    return weights


def standardized(column: np.ndarray, keep: np.ndarray, over: str, prompt_ids: np.ndarray) -> np.ndarray:
    """[N] to mean 0 and deviation 1 over the kept answers (dataset) or those to one prompt; 0 where all are equal."""
    if over == "none":
        return column
    groups = prompt_ids if over == "prompt" else np.zeros_like(prompt_ids)
    mean, deviation = group_moments(column, keep, groups)
    centred = column - mean[groups]
    scale = deviation[groups]
    # deviations of equal numbers are rounding errors
    tiny = scale <= 1e-9 * np.maximum(1, np.abs(mean[groups]))
    return np.where(tiny, 0.0, centred / np.where(tiny, 1.0, scale))


def group_moments(column: np.ndarray, keep: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and (population) deviation of the kept values of every group; NaN and 0 for a group without any."""
    num_groups = int(groups.max(initial=0)) + 1
    count = np.bincount(groups[keep], minlength=num_groups)
    some = np.maximum(count, 1)
    mean = np.bincount(groups[keep], column[keep], num_groups) / some
    square = np.bincount(groups[keep], (column[keep] - mean[groups[keep]]) ** 2, num_groups) / some
    return np.where(count > 0, mean, np.nan), np.sqrt(square)


def write_records(file: Path, names: Sequence[str], table: AnswerTable, total: np.ndarray, values: Values) -> int:
    """Stream the records that have a reward to a file; returns how many."""
    written, logps = 0, values.logps
    with open(file, "wb") as output:
        for i, sample in enumerate(answers(names, table)):
            if sample.key != table.keys[i : i + 1].tobytes():
                raise UserError(
                    f"{sample.place[0]}:{sample.place[1]}: changed while it was read; type the command again"
                )
            if np.isnan(total[i]):
                continue
            record: dict[str, Any] = {"prompt": sample.record["prompt"], "source": sample.source}
            record |= {"response": sample.response, "reward": float(total[i])}
            single = {name: float(column[i]) for name, column in values.rewards.items()}
            record["rewards"] = {name: None if np.isnan(value) else value for name, value in single.items()}
            record |= {name: sample.record[name] for name in CARRIED if sample.record.get(name) is not None}
            if found := {name: float(column[i]) for name, column in logps.items() if not np.isnan(column[i])}:
                record["source_mean_logps"] = record.get("source_mean_logps", {}) | found
            record["key"] = sample.key.hex()
            output.write(json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n")
            written += 1
        sync(output)
    return written
