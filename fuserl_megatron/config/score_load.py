"""Settings of `fuserl score`: the run's from conf/score.yaml, each reward's from conf/reward/NAME.yaml, checked.

On the command line `rewards.NAME.KEY=VALUE` sets a key of one reward. A name without a file is a reward of the user's
own, written out there: `rewards=[mine] rewards.mine.kind=rule rewards.mine.function=...`.
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fuserl_megatron.config.compose import compose_tree, conf_dir
from fuserl_megatron.config.keys import leaves
from fuserl_megatron.config.load import from_dict
from fuserl_megatron.config.score_sections import KINDS, Reward, ScoreConfig
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import first_line, nearest, show

OF_ONE = re.compile(r"\+*rewards\.([^.=]+)\.(.+)", re.DOTALL)
NAME = re.compile(r"[A-Za-z0-9_-]+")
KIND = re.compile(r"kind=(\w+)")


def load_score(
    overrides: Sequence[str] = (),
    config_dir: str | Path | None = None,
    config_name: str | None = None,
    only_output: bool = False,
) -> tuple[ScoreConfig, dict[str, Reward]]:
    """The run's settings, and those of its rewards by name.

    Args:
        overrides: hydra overrides; those that begin with `rewards.NAME.` belong to one reward.
        config_dir: the user's own directory; its folder reward/ is looked into first.
        config_name: root file instead of score.yaml.
        only_output: nothing but `output` must be given, and no reward is read.

    Raises:
        UserError: as of `load_config`, and what cannot work.
    """
    of_rewards: dict[str, list[str]] = {}
    others = []
    for text in overrides:
        if match := OF_ONE.fullmatch(text):
            of_rewards.setdefault(match[1], []).append(match[2])
        else:
            others.append(text)
    config = from_dict(ScoreConfig, compose_tree(ScoreConfig, config_name or "score", others, config_dir))
    if only_output:
        return config, {}
    _check(config)
    for name in of_rewards:
        if name not in config.rewards:
            have = show(config.rewards)
            raise UserError(f"rewards.{name}: not one of rewards={have}.{nearest(name, config.rewards)}")
    return config, {name: load_reward(name, of_rewards.get(name, ()), config_dir) for name in config.rewards}


def load_reward(name: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Reward:
    """The settings of one reward, from its file and `overrides` (without the leading `rewards.NAME.`).

    Raises:
        UserError: no such file, an unknown kind or key, a value that cannot work.
    """
    roots = [Path(root) / "reward" for root in (config_dir, conf_dir()) if root is not None]
    file = next((root / f"{name}.yaml" for root in roots if (root / f"{name}.yaml").is_file()), None)
    given = [match[1] for text in overrides if (match := KIND.fullmatch(text))]
    if file is None and not given:
        known = sorted({found.stem for root in roots for found in root.glob("*.yaml")})
        own = f"for one of your own type rewards.{name}.kind=rule rewards.{name}.function=package.module:function"
        raise UserError(
            f"rewards: no {name}.yaml in conf/reward.{nearest(name, known)} There are {', '.join(known)}; {own}."
        )
    kind = given[-1] if given or file is None else _kind_in(file)
    if kind not in KINDS:
        raise UserError(f"rewards.{name}.kind={show(kind)}: not one of {', '.join(KINDS)}.{nearest(str(kind), KINDS)}")
    if kind == "endpoint" and (wrong := [text for text in overrides if text in ("api=score", "api=rerank")]):
        what = "scores pairs of texts; a reward comes from classify or pooling"
        raise UserError(f"rewards.{name}.{wrong[0]}: {what}.")
    try:
        with tempfile.TemporaryDirectory() as folder:
            if file is None:
                file = Path(folder, f"{name}.yaml")
                file.write_text("{}\n")
            values = compose_tree(KINDS[kind], str(file.resolve()), list(overrides))
        reward = from_dict(KINDS[kind], values)
    except UserError as error:
        raise UserError(f"rewards.{name}: {error}") from None
    _check_reward(f"rewards.{name}", reward)
    return reward


def _kind_in(file: Path) -> Any:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as yaml ({first_line(error)})") from None
    return values.get("kind") if isinstance(values, dict) else None


def _check_reward(where: str, reward: Reward) -> None:
    """Numbers that must be positive, and what must be given."""
    for field in fields(reward):
        value = getattr(reward, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
            raise UserError(f"{where}.{field.name}={show(value)}: must be positive.")
    if reward.kind == "rule" and not all(reward.function.partition(":")[::2]):
        raise UserError(f"{where}.function={reward.function}: is written package.module:function.")
    if reward.kind == "endpoint" and not reward.url:
        raise UserError(f"{where}.url=[]: needs the server's address; type {where}.url=http://127.0.0.1:8000.")


def _check(config: ScoreConfig) -> None:
    """The rules between settings of the run.

    Raises:
        UserError: the first that does not hold.
    """
    if not config.samples:
        raise UserError(
            "samples=[]: what shall be scored? Type samples=DIR (of `fuserl sample`) or samples=[FILE.jsonl]."
        )
    if not config.rewards:
        raise UserError("rewards=[]: by what? Type rewards=[length], or another file of conf/reward.")
    for key in ("samples", "rewards", "logprobs", "heldout", "rescore"):
        values = getattr(config, key)
        if len(set(values)) != len(values):
            raise UserError(f"{key}={show(values)}: one stands twice; name each once.")
    for name in config.rewards:
        if not NAME.fullmatch(name):
            raise UserError(f"rewards=[{name}]: a name has letters, digits, _ and - only.")
    for name in config.rescore:
        if name not in config.rewards:
            raise UserError(
                f"rescore=[{name}]: not one of rewards={show(config.rewards)}.{nearest(name, config.rewards)}"
            )
    if config.heldout_ngram < 1:
        raise UserError(f"heldout_ngram={config.heldout_ngram}: must be at least 1; 13 is usual.")
    combine = config.combine
    if combine.method == "product" and combine.standardize != "none":
        raise UserError(
            "combine.standardize: a product of standardised rewards has no meaning; take method=sum, or none."
        )
    for name, weight in leaves(combine.weights):
        owner = name if name in config.rewards else name.partition(".")[0]
        if owner not in config.rewards:
            have = show(config.rewards)
            raise UserError(f"combine.weights.{name}: not one of rewards={have}.{nearest(name, config.rewards)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight != weight:
            raise UserError(f"combine.weights.{name}={show(weight)}: must be a number.")
