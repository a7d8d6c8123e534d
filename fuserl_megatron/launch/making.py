"""The stages `sample` and `score` of a chain: their settings frozen as a tree like conf/, one file a source or reward.

`fuserl sample --config-dir TREE --config-name TREE/sample.yaml` then asks exactly what the chain was told to ask,
wherever the sources' own files lie and whatever becomes of them.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fuserl_megatron.config.load import to_yaml
from fuserl_megatron.config.sample_load import load_sample
from fuserl_megatron.config.sample_sections import SampleConfig
from fuserl_megatron.config.score_load import load_score
from fuserl_megatron.config.score_sections import ScoreConfig
from fuserl_megatron.util.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Making:
    """One of the two stages."""

    config: SampleConfig | ScoreConfig
    """The run's settings, with plain names of sources or rewards."""
    files: Mapping[str, str]
    """Path in the tree -> text, for each of them."""
    writes: tuple[str, ...]
    """Directories that the next stage reads."""
    gpus: int | None
    """What it can use of the chain's GPUs on a node; None: all."""


def sample_stage(words: Iterable[str], config_dir: str | Path | None) -> Making:
    """Overrides of `fuserl sample`, composed and checked.

    Raises:
        UserError: as of `load_sample`; no prompts or no sources.
    """
    config, sources = load_sample(list(words), config_dir)
    for key, what in (("prompts", "prompts.jsonl"), ("sources", "NAME")):
        if not getattr(config, key):
            raise UserError(f"{key}=[]: needs at least one; type sample.{key}=[{what}]")
    names = [Path(item).name.removesuffix(".yaml") for item in config.sources]
    starts_servers = any(not source.url for source in sources)
    return Making(
        config=dataclasses.replace(config, sources=tuple(names)),
        files=_tree("source", dict(zip(names, sources, strict=True))),
        writes=tuple(f"{config.output}/{source.name}" for source in sources),
        gpus=None if starts_servers else 0,
    )


def score_stage(words: Iterable[str], config_dir: str | Path | None) -> Making:
    """Overrides of `fuserl score`, composed and checked.

    Raises:
        UserError: as of `load_score`.
    """
    config, rewards = load_score(list(words), config_dir)
    has_model = any(reward.kind == "model" for reward in rewards.values())
    return Making(config=config, files=_tree("reward", rewards), writes=(config.output,), gpus=int(has_model))


def _tree(group: str, settings: Mapping[str, Any]) -> dict[str, str]:
    return {f"{group}/{name}.yaml": to_yaml(config) for name, config in settings.items()}
