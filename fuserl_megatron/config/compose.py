"""Hydra's part: the shipped tree, the user's own directory and the command line, composed into plain dictionaries.

Hydra reports a misspelt key as missing from a "struct" and suggests `+`, so keys are checked against the schema before
it sees them, and then set whether or not a yaml file mentions them.
"""

import dataclasses
import re
import shlex
import shutil
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuserl_megatron.config.keys import about_key, all_keys, holds_own_names, leaves, plain
from fuserl_megatron.config.launch_sections import LaunchConfig
from fuserl_megatron.config.schema import Config
from fuserl_megatron.util.credentials import refuse_secrets
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.paths import did_you_mean
from fuserl_megatron.util.text import nearest, one_line, shortened, show

TEXTS = ("cluster.setup", "system", "prompt_format", "separator", "sampling.stop")
"""Keys whose values may have several lines."""
RECIPE_GROUPS = ("method", "scale")
"""Of which a recipe is made."""
LAUNCH_GROUPS, SAMPLE_GROUPS, SCORE_GROUPS = {"cluster"}, {"source"}, {"reward"}
"""Groups of `fuserl launch`, `fuserl sample` and `fuserl score`; the others belong to a training run."""


def conf_dir() -> Path:
    """The shipped hydra tree: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise UserError(
        f"conf/train.yaml is missing beside {package}: reinstall with `pip install --force-reinstall fuserl-megatron`."
    )


def compose_tree(
    schema: type, name: str, overrides: Sequence[str], config_dir: str | Path | None = None
) -> dict[str, Any]:
    """Compose `name` over the schema's defaults into plain dictionaries, all resolved.

    It is a root file without .yaml, or the path of a yaml file, relative to config_dir.

    Raises:
        UserError: unknown key or choice, missing file, text that is no override, a credential among the values.
    """
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if name.endswith((".yaml", ".yml")):
        file = Path(config_dir or ".") / name
        if not file.is_file():
            raise UserError(f"--config-name {name}: no such file{did_you_mean(file)} (looked at {file.resolve()}).")
        config_dir, name = file.parent, file.stem
    shipped = conf_dir()
    primary = shipped if config_dir is None else Path(config_dir).resolve()
    if not primary.is_dir():
        raise UserError(f"--config-dir {config_dir}: no such directory{did_you_mean(primary)}.")
    roots = [primary] if primary == shipped else [primary, shipped]
    root_file = next((root / f"{name}.yaml" for root in roots if (root / f"{name}.yaml").is_file()), None)
    if root_file is None:
        found = sorted({file.stem for root in roots for file in root.glob("*.yaml")})
        raise UserError(
            f"--config-name {name}: no {name}.yaml in {' or '.join(map(str, roots))}.{nearest(name, found)}"
        )
    overrides, plain_values = _check_overrides(schema, overrides, roots)
    try:
        with tempfile.TemporaryDirectory() as main:  # of the root file alone: hydra looks for it in one directory only
            shutil.copy(root_file, main)
            write_recipes(Path(main), roots)
            overrides.append(f"hydra.searchpath=[{','.join(_in_quotes(f'file://{root}') for root in roots)}]")
            with initialize_config_dir(main, version_base="1.3", job_name="fuserl"):
                composed = compose(root_file.stem, overrides)
        OmegaConf.register_new_resolver("by_stage", _by_stage, replace=True)
        defaults = OmegaConf.create(plain(dataclasses.asdict(schema())))
        merged: Any = OmegaConf.to_container(OmegaConf.merge(defaults, composed, plain_values), resolve=True)
    except RecursionError:
        raise UserError(f"{root_file}: nested too deep, or an anchor that holds itself.") from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(one_line(error)) from error
    refuse_secrets(merged)
    refuse_control_characters(merged)
    return merged


RECIPE = """\
# @package _global_
defaults:
  - /method: {method}
  - /scale: {scale}
  - _self_
run: {{name: {name}, results_dir: runs/{name}}}
"""


def recipes(roots: Sequence[Path]) -> dict[str, str]:
    """Name -> yaml of every recipe: SCALE_METHOD, for each file of method/ and of scale/, a user's included."""
    methods, scales = (
        {file.stem for root in roots for file in (root / group).glob("*.yaml")} for group in RECIPE_GROUPS
    )
    names = {f"{scale}_{method}": (method, scale) for scale in sorted(scales) for method in sorted(methods)}
    return {name: RECIPE.format(name=name, method=m, scale=s) for name, (m, s) in names.items()}


def write_recipes(directory: Path, roots: Sequence[Path]) -> None:
    """The group `recipe` of hydra, for one composition."""
    (directory / "recipe").mkdir()
    for name, text in recipes(roots).items():
        if not any((root / "recipe" / f"{name}.yaml").is_file() for root in roots):  # a user's own file comes first
            (directory / "recipe" / f"{name}.yaml").write_text(text, encoding="utf-8")


def _by_stage(stage: str, fusesft: Any, fusepo: Any) -> Any:
    """`${by_stage:${objective.stage},A,B}` in a yaml file: A for FuseSFT, B for FusePO."""
    return fusesft if stage == "fusesft" else fusepo


def refuse_control_characters(values: dict[str, Any]) -> None:
    """Names and paths become lines of job scripts and logs, where a line break would begin a command of its own.

    Raises:
        UserError: names the key, the character written as an escape. Shell lines and texts for models are left alone.
    """
    for key, value in leaves(values):
        for text in value if isinstance(value, list) else [value]:
            breaks = isinstance(text, str) and any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)
            if breaks and not key.endswith(TEXTS):
                raise UserError(f"{key}={ascii(text)[1:-1]}: holds a line break or control character; leave it out.")


def _check_overrides(schema: type, overrides: Sequence[str], roots: list[Path]) -> tuple[list[str], dict[str, Any]]:
    """Refuse unknown keys with the nearest one; let known keys be set whether or not a yaml file mentions them.

    Returns:
        What hydra is given, and the values of keys that it would take for groups, for there is a folder of their name.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    keys, parser, checked, plain_values = all_keys(schema), OverridesParser.create(), [], {}
    folders = {"recipe"} | {folder.name for root in roots for folder in root.iterdir() if folder.is_dir()}
    of_training = folders - {*RECIPE_GROUPS, *LAUNCH_GROUPS, *SAMPLE_GROUPS, *SCORE_GROUPS}
    groups = {Config: of_training, LaunchConfig: folders & LAUNCH_GROUPS}.get(schema, set())
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except (HydraException, ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
            hint = _how_to_write(text)
            raise UserError(f"'{shortened(text)}' is not an override ({one_line(error)}): {shortened(hint)}") from error
        key = parsed.key_or_group
        if parsed.is_sweep_override():
            raise UserError(
                f"'{text}': one run takes one value; a list is written {key}=[...], text with commas in quotes."
            )
        if key not in keys and key not in groups and not holds_own_names(key, schema):
            raise UserError(f"{key}: no such key.{about_key(key, [*keys, *groups])}")
        if parsed.type is OverrideType.DEL:
            raise UserError(
                f"'{text}': keys are set, never removed; leave it out, or write {key}=null where that is allowed."
            )
        value = parsed.value()
        if key in groups and not isinstance(value, dict):
            _check_choice(key, value, roots)
            checked.append(text.lstrip("+"))
        elif key in folders - groups:
            plain_values[key] = value
        else:
            checked.append("++" + text.lstrip("+"))
    return checked, plain_values


def _in_quotes(text: str) -> str:
    """Text as hydra reads it between double quotes, whatever signs it holds."""
    return '"' + re.sub(r'(\\*)"', r'\1\1\\"', re.sub(r"(\\+)$", r"\1\1", text)) + '"'


def _check_choice(group: str, value: Any, roots: list[Path]) -> None:
    made = recipes(roots) if group == "recipe" else ()
    options = sorted({*made, *(file.stem for root in roots for file in (root / group).glob("*.yaml"))})
    if not isinstance(value, str) or value.removesuffix(".yaml") not in options:
        near = nearest(str(value), options) if isinstance(value, str) else ""
        raise UserError(f"{group}={show(value)}: no such choice.{near} There are: {', '.join(options)}.")


def _how_to_write(text: str) -> str:
    """What to type instead of a word that is no override, as a shell takes it."""
    key, equals, value = text.partition("=")
    if equals:
        return "put the value in quotes: " + shlex.quote(f"{key}={_in_quotes(value)}")
    if text.endswith((".yaml", ".yml")):
        return f"a file of settings is given as --config-name {shlex.quote(text)}"
    return "write key=value"
