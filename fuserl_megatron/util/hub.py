"""Hugging Face hub names (`org/name`) where a model or tokenizer directory is asked for.

The files go into the hub client's own cache (HF_HOME), once; its file locks let one process of a node fetch and the
others wait. HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are the client's. Only weights in safetensors, config, tokenizer,
templates and licences are fetched, so no code comes along.
"""

import os
import re
from pathlib import Path

from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.paths import did_you_mean, export_of_run
from fuserl_megatron.util.text import first_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
COMPANION_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
COMPANION_PATTERNS = ("additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)


def local_model(path: str | Path, *, weights: bool = True) -> str:
    """The directory of a model: the path itself, or where the files of a hub name are. A local path always wins.

    Without `weights` only config and tokenizer are fetched, a few MB.

    Raises:
        UserError: a hub name that is neither in the cache nor to be had.
    """
    name = str(path)
    if os.path.exists(name) or not HUB_NAME.fullmatch(name):
        return name
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    files = ("config.json", *TOKENIZER_FILES, *COMPANION_FILES, *COMPANION_PATTERNS, *(WEIGHTS if weights else ()))
    try:
        return snapshot_download(name, allow_patterns=list(files))
    except LocalEntryNotFoundError:
        if near := did_you_mean(name):  # a path here, and no name of the hub
            raise UserError(f"{name}: no such directory{near}") from None
        raise UserError(
            f"{name}: no such directory, not in the hub's cache ({constants.HF_HUB_CACHE}), and the "
            f"hub cannot be reached; give a local directory, or type `hf download {name}` where there is a network"
        ) from None
    except MemoryError:  # no fault of the files
        raise
    except Exception as error:  # the client raises many kinds
        raise UserError(
            f"{name}: no such directory{did_you_mean(name)}, and the hub does not give it ({first_line(error)}); "
            "correct the name, or log in with `hf auth login` if the model asks for that"
        ) from None


def model_directory(path: str | Path) -> Path:
    """The directory of a path or hub name; refuse, in one line, what is not a Hugging Face model directory.

    Raises:
        UserError: what is missing and what to do; as of `local_model`.
    """
    path = Path(local_model(path))
    if not path.exists():
        near = did_you_mean(path) or "; give a local Hugging Face model directory"
        raise UserError(f"{path}: no such directory{near}")
    if not path.is_dir():
        raise UserError(f"{path}: a file; give the Hugging Face model directory that holds config.json and the weights")
    if not (path / "config.json").is_file():
        hint = export_of_run(path)
        if not hint and (list(path.glob("iter_*")) or (path / "latest_checkpointed_iteration.txt").exists()):
            hint = " (it looks like a Megatron checkpoint: convert it with `fuserl convert megatron-to-hf`)"
        raise UserError(f"{path}: no config.json, so not a Hugging Face model directory{hint}; give one that has it")
    return path
