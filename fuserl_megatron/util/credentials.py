"""Credentials live in the environment and nowhere else: not in a configuration, which is saved with the run, and not in
an error message, which is saved in a log."""

import os
import re
from collections.abc import Iterator
from typing import Any

from fuserl_megatron.util.errors import UserError

NAMES = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "APIKEY", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY", "CREDENTIAL")
"""A variable with one of these among the words of its name (HF_TOKEN, not TOKENIZER_PATH) holds a credential, unless
its value is the path of something that exists,"""
SHORTEST = 8
"""or shorter than this: `x` or `true` are none, and stand in every configuration."""
USER_AND_PASSWORD = re.compile(r"://[^/@\s:]*:[^/@\s]+@")


def refuse_secrets(values: Any, path: str = "") -> None:
    """Look through resolved settings for a credential.

    Raises:
        UserError: names the field and the variable, never the value.
    """
    if isinstance(values, dict):
        for key, value in values.items():
            refuse_secrets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for value in values:
            refuse_secrets(value, path)
    elif isinstance(values, str):
        why = "the config is saved with the run; leave it in the environment"
        for name, secret in _secrets():
            if secret in values:
                raise UserError(f"{path}: holds the value of ${name}, and {why}.")
        name, assigned, secret = values.partition("=")
        if assigned and secret and _is_secret_name(name) and not os.path.exists(secret):
            raise UserError(f"{path}: gives {name} a value, and {why}.")
        if USER_AND_PASSWORD.search(values):
            raise UserError(f"{path}: an address with a password in it, and {why} ($MLFLOW_TRACKING_PASSWORD).")


def key_of_environment(where: str, name: str | None) -> str | None:
    """The key in the variable that a setting `api_key_env` names; None where it names none.

    Raises:
        UserError: the variable is not set; begins with `where`.
    """
    key = os.environ.get(name, "").strip() if name is not None else None
    if key == "":
        raise UserError(f"{where}api_key_env={name}: not set in the environment; type export {name}=...")
    return key


def redact(text: str) -> str:
    """The text with every credential replaced by the name of its variable."""
    for name, secret in _secrets():
        text = text.replace(secret, f"${name}")
    return USER_AND_PASSWORD.sub("://...@", text)


def _secrets() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and _is_secret_name(name) and not os.path.exists(value):
            yield name, value


def _is_secret_name(name: str) -> bool:
    words = f"_{name.upper().removesuffix('S')}_"
    return name.isidentifier() and any(f"_{known}_" in words for known in NAMES)
