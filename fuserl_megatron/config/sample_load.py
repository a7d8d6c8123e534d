"""The settings of `fuserl sample` and `fuserl logprobs`: the run's own, and those of every source it names, each from
a file of its own."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from fuserl_megatron.config.compose import compose_tree, conf_dir
from fuserl_megatron.config.load import from_dict
from fuserl_megatron.config.sample_rules import check_run, check_source
from fuserl_megatron.config.sample_sections import AskConfig, LogprobsConfig, SampleConfig, SourceConfig
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.paths import did_you_mean
from fuserl_megatron.util.text import nearest

GROUP = "source"
Run = TypeVar("Run", bound=AskConfig)


def load_sample(
    overrides: Sequence[str] = (), config_dir: str | Path | None = None, config_name: str | None = None
) -> tuple[SampleConfig, list[SourceConfig]]:
    """Compose conf/sample.yaml and a file for each source, all checked.

    Args:
        overrides: of the run (`n=8`), or of one source (`sources.NAME.sampling.temperature=0.7`).
        config_dir: the user's own directory of yaml files, searched before the shipped tree: sources lie in source/.
        config_name: root file (without .yaml) in config_dir or the shipped tree, or the path of a yaml file.

    Raises:
        UserError: what `load_config` refuses, a source that is not there, a rule between settings that does not hold.
    """
    return _load(SampleConfig, "sample", overrides, config_dir, config_name)


def load_logprobs(
    overrides: Sequence[str] = (), config_dir: str | Path | None = None, config_name: str | None = None
) -> tuple[LogprobsConfig, list[SourceConfig]]:
    """The same for conf/logprobs.yaml."""
    return _load(LogprobsConfig, "logprobs", overrides, config_dir, config_name)


def _load(
    schema: type[Run],
    root: str,
    overrides: Sequence[str],
    config_dir: str | Path | None,
    config_name: str | None,
) -> tuple[Run, list[SourceConfig]]:
    own = [text for text in overrides if not _key(text).startswith("sources.")]
    theirs = [text for text in overrides if _key(text).startswith("sources.")]
    run = from_dict(schema, compose_tree(schema, config_name or root, own, config_dir))
    check_run(run)
    names = [Path(item).name.removesuffix(".yaml") for item in run.sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"sources: {twice} is named twice; name each once")
    words: dict[str, list[str]] = {name: [] for name in names}
    for text in theirs:
        key = _key(text).removeprefix("sources.")
        name = max((name for name in names if key.startswith(f"{name}.")), key=len, default=None)
        if name is None:
            raise UserError(f"sources.{key}: no such source.{nearest(key, names)} There are: {', '.join(names)}.")
        words[name].append(text.lstrip("+").removeprefix(f"sources.{name}."))
    sources = [_load_source(item, name, words[name], config_dir) for item, name in zip(run.sources, names, strict=True)]
    called = [source.name for source in sources]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise UserError(f"sources: two of them have name={twice}; their records could not be told apart")
    return run, sources


def _load_source(item: str, name: str, words: list[str], config_dir: str | Path | None) -> SourceConfig:
    if item.endswith(".yaml"):
        if not Path(item).is_file():
            raise UserError(f"sources: {item}: no such file{did_you_mean(item)}")
        config_dir, root = None, str(Path(item).resolve())
    else:
        roots = [Path(config_dir), conf_dir()] if config_dir is not None else [conf_dir()]
        found = sorted({file.stem for root in roots for file in (root / GROUP).glob("*.yaml")})
        if name not in found:
            advice = f"There are: {', '.join(found)}; or give the path of a yaml file"
            raise UserError(f"sources: no source {item}.{nearest(item, found)} {advice}.")
        root = f"{GROUP}/{name}"
    try:
        source = from_dict(SourceConfig, compose_tree(SourceConfig, root, words, config_dir))
        source = dataclasses.replace(source, name=source.name or name)
        check_source(source)
    except UserError as error:
        raise UserError(f"source {name}: {str(error).replace('; type ', f'; type sources.{name}.')}") from None
    return source


def _key(text: str) -> str:
    return text.lstrip("+").partition("=")[0]
