"""Rules that the settings of `fuserl sample` must keep, each with a value that would work."""

import dataclasses
import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from fuserl_megatron.config.rules import refuse
from fuserl_megatron.config.sample_sections import AskConfig, LogprobsConfig, SampleConfig, SamplingConfig, SourceConfig
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import nearest

OURS = ("model", "messages", "prompt", "n", "seed", "stream", "chat_template_kwargs", "return_token_ids", "logprobs")
"""Fields of a request that sampling itself fills in."""
LOOKS_LIKE_A_KEY = re.compile(r"\b(sk|gsk|hf|xai|pplx|nvapi|ghp|AIza)[-_]?[A-Za-z0-9_-]{18,}")
FIELDS = {"model", "name", "port"}


def check_run(config: AskConfig) -> None:
    """The run's own settings.

    Raises:
        UserError: the first rule that does not hold.
    """
    at_least_one = {"max_attempts": 5}
    if isinstance(config, SampleConfig):
        at_least_one |= {"n": 5, "shards": 1}
        last = config.shards - 1
        _check(config, lambda value: 0 <= value <= last, f"must be from 0 to shards - 1 = {last}", {"shard": last})
    if isinstance(config, LogprobsConfig):
        _check(config, lambda value: 0 <= value <= 100, "must be from 0 to 100", {"top_k": 10})
    _check(config, lambda value: value >= 1, "must be at least 1", at_least_one)
    _check(config, lambda value: value > 0, "must be positive", {"patience": 1800})
    _check(config, lambda value: value >= 0, "must not be negative", {"grace": 60})
    _check(config, lambda value: 0 <= value < 1, "must be a share, at least 0 and below 1", {"max_failures": 0.01})


def check_source(config: SourceConfig) -> None:
    """One source's settings.

    Raises:
        UserError: the first rule that does not hold.
    """
    _refuse_keys(config)
    if not re.fullmatch(r"[A-Za-z0-9][\w.@+-]*", config.name or ""):
        rule = "becomes a folder: letters, digits and . _ - @ + without blanks"
        raise UserError(f"name={config.name}: {rule}; name=llama70b would work")
    at_least_one = {
        "max_in_flight": 256,
        "server.replicas": 1,
        "sampling.max_tokens": 2048,
        "sampling.top_k": 40,
    }
    _check(config, lambda value: value >= 1, "must be at least 1", at_least_one)
    not_negative = {
        "sampling.temperature": 0.8,
        "sampling.min_tokens": 1,
        "server.max_restarts": 3,
        "price_input": 0.5,
        "price_output": 1.5,
    }
    _check(config, lambda value: value >= 0, "must not be negative", not_negative)
    positive = {"timeout": 1800, "server.ready_seconds": 1800, "sampling.repetition_penalty": 1.05}
    _check(config, lambda value: value > 0, "must be positive", positive)
    _check(config, lambda value: 0 < value <= 1, "must be above 0 and at most 1", {"sampling.top_p": 0.95})
    _check(config, lambda value: 0 <= value <= 1, "must be at least 0 and at most 1", {"sampling.min_p": 0.05})
    for url in config.url:
        if not re.match(r"https?://[^/]+", url):
            raise UserError(f"url={url}: must begin with http:// or https://, such as http://127.0.0.1:8000/v1")
    if config.kind == "completion":
        if "{prompt}" not in config.prompt_format:
            raise UserError("prompt_format: must hold {prompt}, where the prompt is put in")
        for name in ("system", "chat_template_kwargs"):
            if getattr(config, name):
                raise UserError(f"{name}: a completion source has no chat template; write it into prompt_format")
    for name in config.sampling.extra_body:
        known = [field.name for field in dataclasses.fields(SamplingConfig) if field.name != "extra_body"]
        if name in OURS:
            raise UserError(f"sampling.extra_body.{name}: sampling fills in this field itself; leave it out")
        if name in known:
            raise UserError(f"sampling.extra_body.{name}: is a setting of its own; write sampling.{name}")
        if near := nearest(name, known):
            raise UserError(f"sampling.extra_body.{name}: no such setting.{near}")
    if not config.url:
        _check_command(config)
    elif config.revision is not None:
        raise UserError("revision: only a server that is started here can be told; leave it out where url is given")


def _check_command(config: SourceConfig) -> None:
    named = set(re.findall(r"\{(\w*)\}", config.server.command))
    if unknown := sorted(named - FIELDS):
        raise UserError(f"server.command: {{{unknown[0]}}} is unknown; {{model}}, {{name}} and {{port}} are filled in")
    if "port" not in named:
        raise UserError("server.command: must hold {port}: the port is chosen when the server starts")


def _check(config: Any, holds: Callable[[Any], bool], rule: str, examples: dict[str, Any]) -> None:
    for field, works in examples.items():
        value = attrgetter(field)(config)
        if value is not None and not holds(value):
            refuse(config, field, rule, works)


def _refuse_keys(config: SourceConfig) -> None:
    """A key in a file would be copied into plan.json and the run's log."""
    remedy = "write api_key_env=NAME, and keep the key in that environment variable"
    if config.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", config.api_key_env):
        raise UserError("api_key_env: holds no name of an environment variable (a key itself?); " + remedy)
    for path, value in _texts(dataclasses.asdict(config)):
        name = path.rpartition(".")[2].lower().replace("-", "_")
        is_secret = name in ("api_key", "authorization", "access_token", "hf_token") and value
        if is_secret or LOOKS_LIKE_A_KEY.search(value):
            raise UserError(f"{path}: looks like a key; {remedy}")


def _texts(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in _texts(inner, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list | tuple):
        return [found for inner in value for found in _texts(inner, path)]
    return [(path, value)] if isinstance(value, str) else []
