"""`fuserl launch`, before anything starts: is everything there that a stage reads and no stage of the chain writes?"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fuserl_megatron.data.manifest import Manifest
from fuserl_megatron.records.belonging import Stage
from fuserl_megatron.records.inputs import expand_inputs
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.hub import local_model
from fuserl_megatron.util.paths import did_you_mean


def check_there(stages: Iterable[Stage], todo: Iterable[Stage]) -> None:
    """Look for inputs, data sets, models and templates; a hub name may be fetched, as the stage would.

    Args:
        stages: the whole chain.
        todo: those of its stages that are still to run; what a finished one has read may be gone.

    Raises:
        UserError: names the stage and what is missing.
    """
    import yaml

    written = [Path(stage.results_dir).resolve() for stage in stages]
    for stage in (stage for stage in todo if stage.config):
        try:
            config = yaml.safe_load(stage.config)
            if stage.trains:
                _check_training(config, written)
            elif kind := KINDS.get(stage.name.partition("_")[0]):
                parts = {Path(path).stem: yaml.safe_load(text) for path, text in stage.more_config.items()}
                kind(config, parts, written)
            else:
                _check_build(config, written)
        except UserError as error:
            raise UserError(f"{stage.name}: {error}") from None


def _check_training(config: dict[str, Any], written: list[Path]) -> None:
    data, model, objective = config["data"], config["model"], config["objective"]
    for path in (data["path"], data["validation_path"]):
        if path and not _is_written(path, written):
            Manifest.read(path)
    _check_models({"model.path": model["path"], "model.tokenizer": model["tokenizer"]}, written)
    _check_models({"objective.reference": objective["reference"]}, written)


def _check_sample(config: dict[str, Any], sources: dict[str, dict[str, Any]], written: list[Path]) -> None:
    for key in ("prompts", "samples", "heldout"):
        if named := [path for path in config.get(key) or () if not _is_written(path, written)]:
            expand_inputs(named, key)
    for name, source in sources.items():
        _check_file(f"sources.{name}.demonstrations", source["demonstrations"])


def _check_score(config: dict[str, Any], rewards: dict[str, dict[str, Any]], written: list[Path]) -> None:
    for key in ("samples", "heldout"):
        if named := [path for path in config[key] if not _is_written(path, written)]:
            expand_inputs(named, key)
    for name, reward in rewards.items():
        if reward["kind"] == "model":
            _check_models({f"rewards.{name}.model": reward["model"]}, written)
            _check_file(f"rewards.{name}.chat_template", reward["chat_template"])


KINDS = {"sample": _check_sample, "logprobs": _check_sample, "score": _check_score}


def _check_build(config: dict[str, Any], written: list[Path]) -> None:
    named = [path for path in config["inputs"] if not _is_written(path, written)]
    if named or not config["inputs"]:
        expand_inputs(named, own_reader=config["reader"] is not None)
    _check_models({"tokenizer": config["tokenizer"]}, written)
    _check_file("chat_template", config["chat_template"])


def _check_file(setting: str, path: str | None) -> None:
    if path and not Path(path).is_file():
        raise UserError(f"{setting}={path}: no such file{did_you_mean(path)}")


def _check_models(settings: dict[str, str | None], written: list[Path]) -> None:
    for name, path in settings.items():
        if path and not _is_written(path, written) and not Path(local_model(path, weights=False)).is_dir():
            raise UserError(f"{name}={path}: no such directory{did_you_mean(path)}")


def _is_written(path: str, written: list[Path]) -> bool:
    return any(Path(path).resolve().is_relative_to(folder) for folder in written)
