"""The rewards of a run: which settings change a value, and from settings to what computes values."""

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

from fuserl_megatron.config.score_sections import Reward

NOT_ASKED = {
    "model": ("model", "device", "batch_tokens"),
    "endpoint": ("url", "api_key_env", "in_flight", "timeout", "attempts", "trust_scale"),
    "rule": ("workers",),
}
"""Settings that change no value, or whose meaning shows when it is loaded (a model's weights, whatever its path)."""


def asked(reward: Reward) -> dict[str, Any]:
    """The settings that change a value."""
    values = dataclasses.asdict(reward)
    return {name: value for name, value in values.items() if name not in NOT_ASKED[reward.kind]}


def judges(reward: Reward) -> bool:
    """Whether a model judges: an answer without its end is nothing that it was trained on."""
    return reward.kind != "rule"


def open_reward(name: str, reward: Reward) -> AbstractContextManager[Any]:
    """What computes this reward's values. Nothing is imported before it is called.

    It has `settings()` and `notes()` for the plan, `warnings()`, and `outcomes(samples)`, which takes (position,
    sample) lazily and yields (position, outcome) in any order. An outcome is {"value": number}, perhaps with
    {"parts": {name: number}}, or {"error": why}.

    Raises:
        UserError: the reward cannot be had; here or on entering.
    """
    if reward.kind == "model":
        from fuserl_megatron.making.reward_model import RewardModel

        return RewardModel(name, reward)
    if reward.kind == "endpoint":
        from fuserl_megatron.making.reward_endpoint import Endpoint

        return Endpoint(name, reward)
    from fuserl_megatron.making.rules import RulePool

    return RulePool(name, reward)
