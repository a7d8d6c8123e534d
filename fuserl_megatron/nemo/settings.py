"""A NeMo-Aligner SFT or DPO file in our words: every key is mapped, ignored for a reason, or named as unsupported."""

import operator
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from fuserl_megatron.config.derived import replica_ranks
from fuserl_megatron.config.load import from_dict
from fuserl_megatron.config.schema import Config
from fuserl_megatron.config.validate import validate
from fuserl_megatron.nemo.keys import ANY, TABLE, C, M, Row
from fuserl_megatron.util.credentials import refuse_secrets
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import nearest, one_line, show


class Fate(NamedTuple):
    """What became of one key."""

    nemo: str
    value: str
    status: str
    """mapped, ignored or unsupported."""
    why: str
    """Our key and value, or the reason."""


REQUIRED = {"model.path": "x", "data.path": "x"}
"""What no NeMo file says, with stand-ins to check the rest by."""


def convert(path: str | Path) -> tuple[dict[str, Any], list[Fate]]:
    """Read a NeMo-Aligner file.

    Returns:
        Our settings as nested dictionaries, "???" where the user has to say (model.path, data.path), and the fate of
        every key of the file, in its order.

    Raises:
        UserError: not readable, neither SFT nor DPO, a credential in it, or two keys that say different things.
    """
    leaves = dict(_leaves(path))
    refuse_secrets({key: value for key, value in leaves.items() if isinstance(value, str)})
    stage = _stage(leaves, path)
    ours: dict[str, Any] = {"objective.stage": stage}
    said_by: dict[str, str] = {}
    fates: list[Fate] = []
    for key, value in leaves.items():
        status, why, settings = _fate(key, value, leaves)
        for name, setting in settings.items():
            if name in ours and ours[name] != setting:
                said = f"{said_by[name]} says {show(ours[name])} and {key} {show(setting)}"
                raise UserError(f"{path}: {said}; leave one out.")
            ours[name], said_by[name] = setting, key
        shown = show(value)
        fates.append(Fate(key, shown if shown.isprintable() else ascii(shown), status, why))
    ours |= dict.fromkeys(REQUIRED, "???")
    if ours.get(C + "monitor") is not None:
        ours["data.validation_path"] = "???"
    return _nested(ours), fates


def remaining_problem(settings: dict[str, Any]) -> str | None:
    """The first rule between fields that the settings break, the places to be filled in taken as filled in."""
    filled = {s: {k: "x" if v == "???" else v for k, v in section.items()} for s, section in settings.items()}
    try:
        config = from_dict(Config, filled)
        validate(config, replica_ranks(config.model))
    except UserError as error:
        return str(error)
    return None


def report(settings: dict[str, Any], fates: list[Fate]) -> str:
    """Our yaml file, with the fate of every key above it as comments."""
    import yaml

    lines = []
    for status in ("unsupported", "ignored", "mapped"):
        chosen = [fate for fate in fates if fate.status == status]
        lines.append(f"# {status}: {len(chosen)}")
        lines += [f"#   {fate.nemo}={fate.value}: {fate.why}" for fate in chosen]
    if problem := remaining_problem(settings):
        lines.append(f"# to put right before it runs: {problem}")
    return "\n".join([*lines, "", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)])


def _fate(key: str, value: Any, leaves: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Status, reason and our settings of one key."""
    row = _row(key)
    if row is None:
        known = [row.nemo for row in TABLE]
        return "unsupported", f"not a key of NeMo-Aligner's SFT or DPO that is known here.{nearest(key, known)}", {}
    if isinstance(value, _Unresolved):
        return "unsupported", f"cannot be read: {value}", {}
    if key.endswith("gradient_clip_val") and value is None:
        value = 0.0  # no clipping
    if value is None or value in ([], {}):
        return "ignored", "not set", {}
    for logger in ("wandb", "mlflow"):
        if key.startswith(f"{M}{logger}_logger_kwargs.") and not leaves.get(f"{M}create_{logger}_logger"):
            return "ignored", f"{M}create_{logger}_logger is not true", {}
    if key.startswith("model.peft.lora_tuning.") and leaves.get("model.peft.peft_scheme") != "lora":
        return "ignored", "read with model.peft.peft_scheme=lora only", {}
    if key == "model.activations_checkpoint_num_layers" and leaves.get(_GRANULARITY) != "full":
        return "ignored", f"read with {_GRANULARITY}=full only", {}
    if row.ours is None:
        if row.values == ANY or any(type(value) is type(v) and value == v for v in row.values):  # 1 batch is not 1.0
            if key == _SUM and not value and leaves.get("model.dpo.sft_loss_weight"):
                return "unsupported", "the SFT term is a mean over tokens here, not a sum", {}
            return "ignored", row.note, {}
        return "unsupported", row.note or "there is no such setting", {}
    if isinstance(row.values, dict):
        if (value if isinstance(value, bool) else str(value)) not in row.values:
            only = f"only {', '.join(map(show, row.values))}"
            return "unsupported", f"{only}; {row.note}" if row.note else only, {}
        value = row.values[value if isinstance(value, bool) else str(value)]
    elif key.rpartition(".")[2] in ("max_epochs", "max_steps") and value == -1:
        value = None
    elif key == "model.dpo.sft_loss_weight" and value == 0:
        return "ignored", "no SFT term", {}
    try:
        value = _checked(row.ours, value)
    except UserError as error:
        return "unsupported", str(error), {}
    settings = {row.ours: list(value) if isinstance(value, tuple) else value}
    if key == "model.dpo.preference_loss" and value == "dpo" and leaves.get(_AVERAGE):
        settings = {row.ours: "ln_dpo"}
    elif key == "model.dpo.preference_loss" and value == "ipo":
        settings["objective.length_normalized"] = bool(leaves.get(_AVERAGE))
    return "mapped", ", ".join(f"{name}={show(setting)}" for name, setting in settings.items()), settings


_GRANULARITY = "model.activations_checkpoint_granularity"
_AVERAGE, _SUM = "model.dpo.preference_average_log_probs", "model.dpo.sft_average_log_probs"


def _row(key: str) -> Row | None:
    """The row of a key: the one with its name, else the first whose pattern it fits."""
    return next((r for r in TABLE if r.nemo == key), None) or next((r for r in TABLE if fnmatchcase(key, r.nemo)), None)


def _checked(key: str, value: Any) -> Any:
    """The value as the schema takes it. Raises UserError otherwise."""
    return operator.attrgetter(key)(from_dict(Config, _nested(REQUIRED | {key: value})))


class _Unresolved(str):
    """Why a value could not be read."""


def _leaves(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Every key that holds no further keys, with its value, interpolations resolved."""
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: is no yaml file: {one_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: holds no settings; give NeMo-Aligner's gpt_sft.yaml or gpt_dpo.yaml.")
    if not OmegaConf.has_resolver("multiply"):  # NeMo's own
        OmegaConf.register_new_resolver("multiply", operator.mul)

    def walk(node: DictConfig, prefix: str) -> Iterator[tuple[str, Any]]:
        for key in map(str, node):
            try:
                value = node[key]
            except OmegaConfBaseException as error:
                missing = OmegaConf.is_missing(node, key)
                value = _Unresolved("required and not set" if missing else " ".join(str(error).split("\n")[0].split()))
            if isinstance(value, DictConfig) and len(value):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", OmegaConf.to_container(value) if OmegaConf.is_config(value) else value

    yield from walk(loaded, "")


def _stage(leaves: dict[str, Any], path: str | Path) -> str:
    kinds = {"sft": "fusesft", "dpo": "fusepo"}
    found = [kind for kind in kinds if any(key.startswith(f"trainer.{kind}.") for key in leaves)]
    if len(found) != 1:
        have = "both" if found else "neither"
        raise UserError(f"{path}: has {have} of trainer.sft and trainer.dpo; NeMo-Aligner's SFT or DPO file has one.")
    return kinds[found[0]]


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return nested
