"""The rewards of a run: from a name in `rewards=[...]` to typed settings, and from these to what computes values."""

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

from fuserl_megatron.config.load import from_dict
from fuserl_megatron.config.schema import UserError
from fuserl_megatron.config.score_sections import KINDS, EndpointReward, ModelReward, RuleReward, ScoreConfig
from fuserl_megatron.config.words import nearest, show

Reward = ModelReward | EndpointReward | RuleReward
NOT_ASKED = {"model": ("model", "device", "batch_tokens"), "rule": ("workers",)}
NOT_ASKED["endpoint"] = ("url", "api_key_env", "in_flight", "timeout", "attempts", "trust_scale")
"""Fields that change no value, or whose meaning is found when it is loaded (a model's weights, whatever its path)."""


def typed_rewards(config: ScoreConfig) -> dict[str, Reward]:
    """The settings of every reward that is asked for, by name, checked.

    Raises:
        UserError: an unknown kind or key, a value that cannot work.
    """
    return {name: typed_reward(name, config.reward[name]) for name in config.rewards}


def typed_reward(name: str, values: Any) -> Reward:
    """One reward's settings from its section.

    Raises:
        UserError: as of `typed_rewards`.
    """
    where = f"reward.{name}"
    kind = values.get("kind") if isinstance(values, dict) else None
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise UserError(f"{where}.kind={show(kind)}: not one of {known}.{nearest(str(kind), KINDS)}")
    if kind == "endpoint" and values.get("api") in ("score", "rerank"):
        raise UserError(f"{where}.api={values['api']}: scores pairs of texts; a reward comes from classify or pooling.")
    reward = from_dict(KINDS[kind], values, prefix=f"{where}.")
    _check(where, reward)
    return reward


def asked(reward: Reward) -> dict[str, Any]:
    """The settings that change a value."""
    values = dataclasses.asdict(reward)
    return {name: value for name, value in values.items() if name not in NOT_ASKED[reward.kind]}


def judges(reward: Reward) -> bool:
    """Whether a model judges: an answer without its end is nothing that it was trained on."""
    return reward.kind != "rule"


def open_reward(name: str, reward: Reward) -> AbstractContextManager[Any]:
    """What computes this reward's values: `settings`, `notes`, `warnings`, `outcomes`. Loads nothing before `with`."""
    if reward.kind == "model":
        from fuserl_megatron.making.reward_model import RewardModel

        return RewardModel(name, reward)
    if reward.kind == "endpoint":
        from fuserl_megatron.making.reward_endpoint import Endpoint

        return Endpoint(name, reward)
    from fuserl_megatron.making.rules import RulePool

    return RulePool(name, reward)


def _check(where: str, reward: Reward) -> None:
    """Numbers that must be positive, and what must be given."""
    for field in dataclasses.fields(reward):
        value = getattr(reward, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
            raise UserError(f"{where}.{field.name}={show(value)}: must be positive.")
    if reward.kind == "rule" and not all(reward.function.partition(":")[::2]):
        raise UserError(f"{where}.function={reward.function}: is written package.module:function.")
    if reward.kind == "endpoint" and not reward.url:
        raise UserError(f"{where}.url=[]: needs the server's address; type {where}.url=http://127.0.0.1:8000.")
