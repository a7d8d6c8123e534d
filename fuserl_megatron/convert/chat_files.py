"""How an exported model is talked to: the chat template its data were rendered with, and the token it stops at.

The files copied from the source model say what that model was used with. What it was trained with since then replaces
the template and is added to the stop tokens of generation_config.json, the only ones that `generate` and vLLM look at.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import first_line

TEMPLATE, TOKENIZER, GENERATION = "chat_template.jinja", "tokenizer_config.json", "generation_config.json"


@dataclass(frozen=True)
class ChatFormat:
    """What the data of a training say about how the model is used."""

    template: str | None = None
    """Text of the chat template; None leaves the source's."""
    end_of_turn_id: int | None = None
    """The token that ends an answer; None leaves the source's stop tokens."""


def carry_chat(directory: Path, chat: ChatFormat, config: dict[str, Any]) -> None:
    """Put template and stop token into a directory that holds the source's files and config.

    Files that say the same already stay as they are, byte for byte.

    Raises:
        UserError: tokenizer_config.json or generation_config.json is no JSON object.
    """
    if chat.template is not None and chat.template != _template_of(directory):
        (directory / TEMPLATE).write_text(chat.template, encoding="utf-8")
        shutil.rmtree(directory / "additional_chat_templates", ignore_errors=True)  # of another way to talk
        (directory / "chat_template.json").unlink(missing_ok=True)
        if "chat_template" in (values := _read(directory / TOKENIZER)):
            del values["chat_template"]
            _write(directory / TOKENIZER, values)
    if chat.end_of_turn_id is not None:
        _add_stop_token(directory / GENERATION, chat.end_of_turn_id, config)


def _template_of(directory: Path) -> str | None:
    """The template where it is the only one, in the only place."""
    several = (directory / "additional_chat_templates").exists() or (directory / "chat_template.json").exists()
    inside = _read(directory / TOKENIZER).get("chat_template")
    if several or not isinstance(inside, str | None):
        return None
    file = directory / TEMPLATE
    return file.read_text(encoding="utf-8") if file.is_file() else inside


def _add_stop_token(file: Path, token: int, config: dict[str, Any]) -> None:
    values = _read(file)
    if not file.exists():  # transformers would take these from config.json
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        values = {name: config[name] for name in names if config.get(name) is not None}
    stops = values.get("eos_token_id")
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if token not in stops:
        values.pop("_from_model_config", None)  # transformers may then take config.json's again
        _write(file, values | {"eos_token_id": [*stops, token]})


def _read(file: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file.name} of the source model is not readable ({first_line(error)}); copy it again"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{file.name} of the source model is no JSON object; copy it again")
    return values


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
