"""`reward_temperature=auto`: the accuracy of the reward, from one of three places, and the temperature by the rule.

The rule and its measurements are in objectives/temperature.py; here are the file of labelled pairs, what the manifest
keeps (`temperature_rule`), and the words. docs/data_format.md is the user's view.

Shapes: G prompts, K sources.
"""

import math
import os
from typing import Any

import numpy as np
from torch import Tensor

from fuserl_megatron.config.schema import BuildConfig
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.rewards import reward_table
from fuserl_megatron.objectives.temperature import (
    accuracy_of_agreement,
    correlation_interval,
    rule_temperature,
    score_correlation,
    share_interval,
    within_prompt_deviation,
)
from fuserl_megatron.objectives.weights import effective_number_of_sources, source_weights
from fuserl_megatron.records.files import rows
from fuserl_megatron.records.grouping import LoadedRecords
from fuserl_megatron.records.records import decode, number_field
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import file_sha256

EXAMPLE_ACCURACIES = (0.65, 0.75, 0.9)
PAIR_FIELDS = ("chosen_reward", "rejected_reward")
NO_BETTER = "the reward tells nothing about which answer is better: set reward_temperature=inf (uniform weights)"


class TemperatureMissing(UserError):
    """No reward_temperature; `table` holds lines that say what the rule gives on these data."""

    def __init__(self, scores_GK: Tensor):
        """From [G, K] scores; -inf where a source is absent."""
        self.table = _rule_table(scores_GK)
        what = "type reward_temperature=auto with reward_accuracy=A, or a number such as reward_temperature=0.1"
        where = "; what auto gives on these data is printed above" if self.table else ""
        if not self.table:
            what = "type reward_temperature=1 (no prompt has two sources whose scores differ: any temperature will do)"
        super().__init__(f"reward_temperature is required: {what}{where}")


def known_accuracy(config: BuildConfig) -> dict[str, Any] | None:
    """The accuracy that is known before the records are read, as the manifest keeps it; None where there is none yet.

    Raises:
        UserError: a bad pair, as file:line; a file without pairs; an accuracy of 0.5 or less.
    """
    if config.calibration is not None:
        return _measured(config.calibration)
    if config.reward_accuracy is not None:
        return {"accuracy": config.reward_accuracy, "accuracy_from": "reward_accuracy"}
    return None


def _measured(name: str) -> dict[str, Any]:
    """Accuracy on a file of labelled pairs. A tie counts as half: the reward would have to toss a coin."""
    if not name.endswith((".jsonl", ".jsonl.gz")) or not os.path.isfile(name):
        what = "is not .jsonl or .jsonl.gz" if os.path.isfile(name) else "does not exist, or is no file"
        raise UserError(f"calibration: {name} {what}: name a file with one labelled pair a line")
    number, right, ties = 0, 0, 0
    for place, line in rows(name):
        assert isinstance(line, bytes)  # of JSONL
        pair = decode(place, line)
        chosen, rejected = (number_field(place, pair, field, PAIR_FIELDS) for field in PAIR_FIELDS)
        number, right, ties = number + 1, right + (chosen > rejected), ties + (chosen == rejected)
    if not number:
        raise UserError(f"calibration: {name} holds no pair: each line needs {', '.join(PAIR_FIELDS)}")
    accuracy = (right + ties / 2) / number
    if accuracy <= 0.5:
        what = f"the chosen answer has the higher reward in {right} of {number} pairs and the same in {ties}"
        raise UserError(f"calibration: {name}: {what}, so {NO_BETTER}")
    return {
        "accuracy": accuracy,
        "accuracy_interval": list(share_interval(accuracy, number)),
        "accuracy_from": "calibration",
        "pairs": number,
        "ties": ties,
        "file": {"name": name, "sha256": file_sha256(name)},
    }


def temperature(
    config: BuildConfig,
    accuracy: dict[str, Any] | None,
    scores_GK: Tensor,
    loaded: LoadedRecords,
    data: FusedDataset,
) -> tuple[float, dict[str, Any] | None]:
    """The temperature of a data set as a number, and with auto what it came from, as the manifest keeps it.

    Args:
        config: the build's settings.
        accuracy: of `known_accuracy`.
        scores_GK: [G, K] scores of the data set; -inf where a source is absent.
        loaded: the records; with `second_reward` they hold that field.
        data: the data set, written.

    Raises:
        UserError: nothing to go by: one source a prompt, equal scores, or a second reward that does not agree at all.
    """
    if config.reward_temperature != "auto":
        return config.reward_temperature, None
    deviation = within_prompt_deviation(scores_GK)
    if not deviation > 0:
        why = "no prompt has two sources" if math.isnan(deviation) else "the sources' scores are equal in every prompt"
        raise UserError(f"reward_temperature=auto: {why}, nothing to go by: any number gives the same weights")
    if accuracy is None:
        accuracy = _agreed(config, scores_GK, loaded, data)
    return rule_temperature(accuracy["accuracy"], deviation), {"score_deviation": deviation, **accuracy}


def _agreed(config: BuildConfig, scores_GK: Tensor, loaded: LoadedRecords, data: FusedDataset) -> dict[str, Any]:
    """The accuracy that follows from how well two reward models agree within the prompts."""
    names, name = [entry["name"] for entry in loaded.inputs], config.second_reward
    inputs, lines = data.places()
    others = [loaded.second_rewards[names[i], int(line)] for i, line in zip(inputs, lines, strict=True)]
    other_GK = _scores(config, data.response_offsets, data.source_ids, np.array(others), len(loaded.sources))
    correlation, number = score_correlation(scores_GK, other_GK)
    if math.isnan(correlation):
        raise UserError(f"second_reward={name}: by it the sources' scores are equal in every prompt: leave it out")
    if correlation <= 0:
        what = f"within prompts its scores correlate by {correlation:.3f} with the reward's"
        raise UserError(f"second_reward={name}: {what}, so at least one of them tells nothing: use labelled pairs")
    interval = correlation_interval(correlation, number)
    return {
        "accuracy": accuracy_of_agreement(correlation),
        "accuracy_interval": [accuracy_of_agreement(end) for end in interval],
        "accuracy_from": "second_reward",
        "field": name,
        "correlation": correlation,
    }


def scores_as_read(config: BuildConfig, loaded: LoadedRecords) -> Tensor:
    """[G, K] scores of the records before they are tokenised; -inf where a source is absent."""
    sizes = [len(g.responses) for g in loaded.groups]
    source_ids = np.array([source_id for g in loaded.groups for source_id, _ in g.responses])
    rewards = np.array([reward for g in loaded.groups for reward, _ in g.responses.values()])
    return _scores(config, np.concatenate([[0], np.cumsum(sizes)]), source_ids, rewards, len(loaded.sources))


def _scores(
    config: BuildConfig, offsets: np.ndarray, source_ids: np.ndarray, rewards: np.ndarray, num_sources: int
) -> Tensor:
    table = reward_table(offsets, source_ids, rewards, num_sources)
    return table.scores(config.reward_standardization, config.score_aggregation)


def rule_line(tau: float, rule: dict[str, Any]) -> str:
    """What the summary says of a temperature that auto found."""
    how = {
        "reward_accuracy": lambda: "as given",
        "calibration": lambda: f"on {rule['pairs']:,} labelled pairs, {rule['ties']:,} ties",
        "second_reward": lambda: f"correlation {rule['correlation']:.3f} with {rule['field']}",
    }[rule["accuracy_from"]]()
    line = f"reward_temperature {tau:.4g} by the rule (auto): scores deviate by {rule['score_deviation']:.4g} within a "
    line += f"prompt, the reward's accuracy is {rule['accuracy']:.3f} ({how}"
    if interval := rule.get("accuracy_interval"):
        low, high = interval
        ends = [math.inf if a <= 0.5 else rule_temperature(a, rule["score_deviation"]) for a in (high, low)]
        line += f"; 95 % interval {low:.3f} to {high:.3f}, which is reward_temperature {ends[0]:.4g} to {ends[1]:.4g}"
    return line + ")"


def _rule_table(scores_GK: Tensor) -> list[str]:
    """The rule's temperature at three accuracies; empty where there is nothing to go by."""
    deviation = within_prompt_deviation(scores_GK)
    if not deviation > 0:
        return []
    what = f"scores deviate by {deviation:.4g} within a prompt (of {scores_GK.shape[1]} sources)"
    lines = [f"reward_temperature=auto on these data, where {what}:"]
    lines.append("  reward_accuracy  reward_temperature  effective number of sources")
    for accuracy in EXAMPLE_ACCURACIES:
        tau = rule_temperature(accuracy, deviation)
        number = float(effective_number_of_sources(source_weights(scores_GK, None, tau)).mean())
        lines.append(f"  {accuracy:<15}  {tau:<18.4g}  {number:.2f}")
    return lines
