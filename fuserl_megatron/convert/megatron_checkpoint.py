"""A Megatron checkpoint as a model: where it lies, which config belongs to it, its parameters by name.

Legend: as in offline.py.
"""

import functools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuserl_megatron.checkpoint.manifest import refuse_damage
from fuserl_megatron.checkpoint.reader import DistReader
from fuserl_megatron.checkpoint.torch_dist import INDEX, LAYERS, POINTER, iteration_directory, newest_iteration
from fuserl_megatron.convert.chat_files import ChatFormat
from fuserl_megatron.convert.hf_config import ModelShape
from fuserl_megatron.convert.model_card import run_figures
from fuserl_megatron.convert.names import TE_FUSED, find_rule, hf_parts, hf_shapes, megatron_names, te_name
from fuserl_megatron.convert.shards import check_num_layers
from fuserl_megatron.data.manifest import RUN_COPY, Manifest
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.hub import local_model
from fuserl_megatron.util.json_files import BadFile, read_bytes, read_json
from fuserl_megatron.util.paths import did_you_mean


@dataclass(frozen=True)
class Checkpoint:
    """A Megatron checkpoint and what is needed to make a Hugging Face model of it."""

    folder: Path
    """The iteration's folder."""
    config_dir: Path
    """Holds config.json."""
    tokenizer_dir: Path
    lineage: dict[str, Any]
    chat: ChatFormat | None = None
    """Of the data it was trained on; None where it is not a run's."""


def find_checkpoint(path: str | Path, hf: str | Path | None = None) -> Checkpoint:
    """Locate a checkpoint and its Hugging Face parts.

    Args:
        path: a checkpoint root, one of its `iter_*` folders, or the results folder of a `fuserl train` run.
        hf: directory or hub name with config.json and tokenizer; None looks for `hf/`, then the run's config.yaml.

    Raises:
        UserError: there is no checkpoint, it is damaged, or nothing says which model it is of.
    """
    path = Path(os.path.abspath(path))  # "." has neither a name nor a parent
    if not path.is_dir():
        near = did_you_mean(path) or "; give a Megatron checkpoint or the folder of a training run"
        raise UserError(f"{path}: no such directory{near}")
    folder = iteration_folder(path)
    if folder is None:
        hint = "; it is a Hugging Face directory already" if (path / "config.json").exists() else ""
        raise UserError(f"{path}: no {POINTER}, so not a Megatron checkpoint{hint}; give one that has it")
    refuse_damage(folder)
    root = folder.parent
    lineage, file = {"checkpoint": str(folder)}, root / "lineage.json"
    if file.exists():
        lineage |= read_json(file, "readable as a JSON object", "remove it or copy it again")
    if hf is not None:
        config_dir = tokenizer_dir = Path(local_model(hf, weights=False))
    elif (root / "hf" / "config.json").is_file():
        config_dir = tokenizer_dir = root / "hf"
    elif (root.parent / "config.yaml").is_file():
        config_dir, tokenizer_dir, lineage = _from_run(root.parent / "config.yaml", lineage)
    else:
        raise UserError(f"{root}: does not say which model it holds; name a directory with its config.json: --hf DIR")
    if not (config_dir / "config.json").is_file():
        raise UserError(f"{config_dir}: no config.json there; name a directory with the model's config.json: --hf DIR")
    chat = None
    if (copy := root.parent / RUN_COPY).is_file():
        manifest = Manifest.read_file(copy)
        chat = ChatFormat(manifest.chat_template, manifest.end_of_turn_id)
        lineage |= manifest.lineage() | {"figures": run_figures(root.parent)}
    return Checkpoint(folder, config_dir, tokenizer_dir, lineage, chat)


def iteration_folder(path: Path) -> Path | None:
    """The folder of numbers that a path of `find_checkpoint` stands for; None when it is no checkpoint.

    Raises:
        UserError: the pointer is not a number, or names a checkpoint that is not there.
    """
    if path.name.startswith("iter_") or (path / INDEX).exists():
        return path
    root = path if (path / POINTER).exists() else path / "checkpoints"
    iteration = newest_iteration(root)
    return None if iteration is None else iteration_directory(root, iteration)


def _from_run(file: Path, lineage: dict[str, Any]) -> tuple[Path, Path, dict[str, Any]]:
    import yaml

    try:
        config = yaml.safe_load(read_bytes(file, "name the model with --hf DIR"))
        json.dumps(config, default=str)  # as the model card will hold it: aliases may make a circle
        model = config["model"]
        directory, tokenizer = Path(model["path"]), Path(model.get("tokenizer") or model["path"])
    except BadFile:
        raise
    except (ValueError, RecursionError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a run's config ({type(error).__name__}); name the model with --hf DIR") from None
    if not directory.is_dir():
        raise UserError(f"{file}: model.path = {directory} is not here; name the model the run started from: --hf DIR")
    return directory, tokenizer, lineage | {"target": str(directory), "name": file.parent.name, "config": config}


def check_checkpoint(reader: DistReader, shape: ModelShape) -> torch.dtype:
    """Compare a checkpoint's model keys with what the config promises, in both directions.

    Returns:
        The dtype that holds all of them without loss.

    Raises:
        UserError: one line naming the first key that is missing, unknown or of another size.
    """
    if any(key.startswith("adapters.") for key in reader.keys):
        raise UserError(
            f"{reader.directory}: holds a LoRA adapter alone; the run it is of exports it at its end: type its command "
            "again, with adapter.export=merged or adapter"
        )
    check_num_layers(shape, num_tensors(reader), reader.directory)
    expected: dict[str, tuple[int, ...]] = {}
    sizes = hf_shapes(shape)
    for name in megatron_names(shape):
        row, parts = find_rule(name)[0], hf_parts(name, shape)
        size = (sum(rows for *_, rows in parts), *sizes[parts[0][0]][1:])
        key, layer = stored_key(reader, name)
        whole = size if layer is None else (shape.num_layers, *size)
        stored = reader.keys.get(key)
        if stored is None:
            raise UserError(
                f"{reader.directory}: no {key}, which this config calls for; name the right model with --hf"
            )
        expected[key] = whole
        padded = row.rule == "vocab" and stored.size[:1] >= whole[:1] and stored.size[1:] == whole[1:]
        if stored.size != whole and not padded:
            raise UserError(
                f"{reader.directory}: {key} has size {list(stored.size)}, but the config calls for {list(whole)}; "
                "name the right model with --hf"
            )
        if not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
            raise UserError(
                f"{reader.directory}: {key} has dtype {stored.dtype}; save the checkpoint in bfloat16 first"
            )
    for key in reader.keys:
        if key.startswith(("embedding.", "decoder.", "output_layer.")) and key not in expected:
            raise UserError(f"{reader.directory}: holds {key}, which this config does not know; name the right model")
    return widest(reader.keys[key].dtype for key in expected)


def num_tensors(reader: DistReader) -> int:
    """How many parameters the keys hold: a key that is stacked over layers holds one of each."""
    own_layer = re.compile(re.escape(LAYERS) + r"\d+\.")
    is_stacked = (key.startswith(LAYERS) and not own_layer.match(key) for key in reader.keys)
    return sum(k.size[0] if s and k.size else 1 for s, k in zip(is_stacked, reader.keys.values(), strict=True))


def stored_key(reader: DistReader, name: str) -> tuple[str, int | None]:
    """Where a parameter lies: stacked over layers, or under its own layer (what core writes when layers differ)."""
    key, layer = checkpoint_key(name)
    if layer is None or key in reader.keys:
        return key, layer
    for own in (te_name(name), name):
        if own in reader.keys:
            return own, None
    local = {fused: plain for plain, fused in TE_FUSED.items()}.get(key.removeprefix(LAYERS))
    return (LAYERS + local, layer) if local and LAYERS + local in reader.keys else (key, layer)


def checkpoint_key(name: str) -> tuple[str, int | None]:
    """A parameter's key in a checkpoint, and its layer: core stacks the layers and uses Transformer Engine's names."""
    layer = find_rule(name)[1]
    name = te_name(name)
    return (name, None) if layer is None else (LAYERS + name.removeprefix(f"{LAYERS}{layer}."), layer)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds them all without loss."""
    return functools.reduce(torch.promote_types, dtypes)
