"""The launcher's configuration taken apart: its own settings, and the overrides that belong to each stage."""

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuserl_megatron.config.compose import compose_tree
from fuserl_megatron.config.keys import leaves
from fuserl_megatron.config.launch_sections import LaunchConfig, StageName
from fuserl_megatron.config.load import from_dict
from fuserl_megatron.config.peer_names import peer_advice
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import nearest, show

ORDER: tuple[str, ...] = typing.get_args(StageName)
READS = {
    "logprobs": ("sample",),
    "score": ("sample", "logprobs"),
    "build_sft": ("import", "score"),
    "build_po": ("import", "score"),
    "build_heldout": ("import",),
    "fusesft": ("import", "build_sft"),
    "reference": ("import", "build_po", "fusesft"),
    "fusepo": ("import", "build_po", "fusesft", "reference"),
    "export": ("fusesft", "fusepo"),
    "evaluate": ("import", "build_heldout", "fusesft", "fusepo", "export"),
}
"""Whose results a stage reads, where they are stages of the chain, too."""
# fmt: off
SECTIONS = ("sample", "logprobs", "score", "train", "build_sft", "build_po", "build_heldout", "fusesft", "reference",
            "fusepo", "evaluate")
# fmt: on
"""Sections whose keys are those of `fuserl sample`, `logprobs`, `score`, `build` or `train`."""


def load_sections(
    overrides: Sequence[str], config_dir: str | Path | None, config_name: str | None
) -> tuple[LaunchConfig, dict[str, dict[str, str]]]:
    """The launcher's settings, run.results_dir absolute, and for each section its overrides by key.

    Raises:
        UserError: a key that neither the launcher nor a section has, a value of the wrong type.
    """
    own, words = _by_section(overrides)
    values = compose_tree(LaunchConfig, config_name or "config", own, config_dir)
    from_yaml = {name: values.pop(name, None) or {} for name in (*SECTIONS, "import")}
    if isinstance(values.get("export"), dict):
        from_yaml["export"] = {"cluster": values["export"].pop("cluster", {})}
    _refuse_keys(from_yaml["import"], "import", ["cluster"])
    known = [field.name for field in dataclasses.fields(LaunchConfig)]
    _refuse_keys(values, "", [*known, *SECTIONS, "import"])
    config = from_dict(LaunchConfig, values)
    root = str(Path(config.run.results_dir).resolve())
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, results_dir=root))
    for name, section in from_yaml.items():
        if not isinstance(section, dict):
            raise UserError(f"{name}={show(section)}: is a section; write {name}.KEY=value.")
        words[name] = {key: override(key, value) for key, value in leaves(section)} | words.get(name, {})
    return config, words


def _by_section(overrides: Sequence[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The launcher's own overrides, and those of each section by key, the section's name taken off."""
    own: list[str] = []
    words: dict[str, dict[str, str]] = {}
    known = [*SECTIONS, *ORDER, *(field.name for field in dataclasses.fields(LaunchConfig))]
    for text in overrides:
        key = key_of(text)
        section, _, rest = key.partition(".")
        if section not in known:
            raise UserError(f"{key}: no such key.{peer_advice(key, known) or nearest(section, known)}")
        if section in SECTIONS or (rest.startswith("cluster.") and section in ORDER) or section == "import":
            if section == "import":
                _refuse_keys({rest.partition(".")[0]: None}, section, ["cluster"])
            if not rest:
                raise UserError(f"'{text}': {section} is a section; write {section}.KEY=value.")
            words.setdefault(section, {})[rest] = text.lstrip("+").removeprefix(f"{section}.")
        else:
            own.append(text)
    return own, words


def key_of(text: str) -> str:
    """The key of an override."""
    return text.lstrip("+").partition("=")[0]


def _refuse_keys(values: Mapping[str, Any] | None, section: str, known: Iterable[str]) -> None:
    for key in values or {}:
        if key not in known:
            full = f"{section}.{key}" if section else key
            raise UserError(f"{full}: no such key.{nearest(key, known)}")


def override(key: str, value: Any) -> str:
    """key=value in hydra's grammar, so that it reads back as the same value."""
    return f"{key}={_grammar(value)}"


def _grammar(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ",".join(_grammar(item) for item in value) + "]"
    if not isinstance(value, str):
        return show(value)
    plain = re.fullmatch(r"[A-Za-z_./~][\w./~@%+-]*", value) and value.lower() not in ("null", "true", "false", "nan")
    if plain and value.lower() not in ("inf", "on", "off", "yes", "no"):
        return value
    return '"' + re.sub(r'(\\*)"', r'\1\1\\"', value) + '"'


def value_of(word: str) -> str:
    """The value of an override, as text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return str(OverridesParser.create().parse_override(word).value())
