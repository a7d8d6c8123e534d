"""The stages `sample`, `logprobs` and `score`: their settings frozen as a tree like conf/, one file a source or reward.

`fuserl sample --config-dir TREE --config-name TREE/sample.yaml` then asks exactly what the chain was told to ask,
wherever the sources' own files lie and whatever becomes of them.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuserl_megatron.config.load import to_yaml
from fuserl_megatron.config.sample_load import load_logprobs, load_sample
from fuserl_megatron.config.sample_sections import LogprobsConfig, SampleConfig, SourceConfig
from fuserl_megatron.config.score_load import load_score
from fuserl_megatron.config.score_sections import ScoreConfig
from fuserl_megatron.util.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Making:
    """One stage."""

    config: SampleConfig | LogprobsConfig | ScoreConfig
    """The run's settings, with plain names of sources or rewards."""
    files: Mapping[str, str]
    """Path in the chain's folder -> text, for each of them."""
    tree: str = ""
    """The folder in there that is the command's --config-dir: a source may be set otherwise for another stage."""
    writes: tuple[str, ...]
    """Directories that the next stage reads."""
    gpus: int | None
    """What it can use of the chain's GPUs on a node; None: all."""
    source: str | None = None
    """The one source of a job that has no other."""
    tasks: int = 0
    """Of the array job that it is; 0: none."""


def asking_stages(kind: str, words: Iterable[str], config_dir: str | Path | None, apart: bool) -> dict[str, Making]:
    """Overrides of `fuserl sample` or `fuserl logprobs`, composed and checked, by name of the stage.

    Args:
        kind: sample or logprobs.
        words: the overrides.
        config_dir: the user's own directory.
        apart: a stage for each source, instead of one that asks all of them.

    Raises:
        UserError: as of `load_sample`; nothing to ask about, or no sources.
    """
    load = load_sample if kind == "sample" else load_logprobs
    config, sources = load(list(words), config_dir)
    about = ("prompts", "prompts.jsonl") if kind == "sample" else ("samples", "DIR")
    for key, what in (about, ("sources", "NAME")):
        if not getattr(config, key):
            raise UserError(f"{key}=[]: needs at least one; type {kind}.{key}=[{what}]")
    names = [Path(item).name.removesuffix(".yaml") for item in config.sources]
    both = list(zip(names, sources, strict=True))
    if not apart:
        return {kind: _asking(config, both)}
    stages = [f"{kind}_{re.sub(r'[^A-Za-z0-9]', '_', source.name or '')}" for source in sources]
    stages = stages if len(stages) > 1 else [kind]
    if twice := next((name for name in stages if stages.count(name) > 1), None):
        raise UserError(f"sources: two of them would have a job {twice}; give one another name")
    tasks = config.shards if isinstance(config, SampleConfig) and config.shards > 1 else 0
    made = (dataclasses.replace(_asking(config, [one]), source=one[0], tasks=tasks) for one in both)
    return dict(zip(stages, made, strict=True))


def _asking(config: SampleConfig | LogprobsConfig, sources: Sequence[tuple[str, SourceConfig]]) -> Making:
    names, tree = tuple(name for name, _ in sources), "" if isinstance(config, SampleConfig) else "logprobs"
    return Making(
        config=dataclasses.replace(config, sources=names),
        files=_tree(f"{tree}/source" if tree else "source", dict(sources)),
        tree=tree,
        writes=tuple(f"{config.output}/{source.name}" for _, source in sources),
        gpus=None if any(not source.url for _, source in sources) else 0,
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
