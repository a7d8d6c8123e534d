"""Whole Hugging Face directories: is this one, and write one so that it is either complete or not there.

An export is prepared in a hidden directory beside its destination (same file system) and renamed at the very end. What
`transformers`, vLLM and others need travels along: config, tokenizer, chat template, generation config, licence files;
the model card says where the weights come from.

One process calls `export_directory`. Several (the ranks of a training run) share the three steps it is made of: rank 0
`begin_export`, all ranks `ShardWriter(..., create=False)`, rank 0 `finish_export` with every rank's written names, or
`discard`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fuserl_megatron.convert.chat_files import ChatFormat, carry_chat
from fuserl_megatron.convert.hf_config import DTYPES, ModelShape, read_config
from fuserl_megatron.convert.model_card import model_card
from fuserl_megatron.convert.names import hf_shapes
from fuserl_megatron.convert.shard_writer import DEFAULT_SHARD_BYTES, ShardWriter, total_bytes
from fuserl_megatron.convert.shards import ShardReader, check_tensors
from fuserl_megatron.convert.weight_files import find_files
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.hub import COMPANION_FILES, COMPANION_PATTERNS, TOKENIZER_FILES, model_directory
from fuserl_megatron.util.json_files import write_json
from fuserl_megatron.util.whole_directory import cannot_write, check_destination, create_partial, discard, publish


def check_model_directory(path: str | Path, allow_pickle: bool = False) -> Path:
    """The directory of a path or hub name; refuse, in one line, what is not a complete Hugging Face model directory.

    Looks at files and their headers' existence only; `read_config` and `check_tensors` look inside.

    Returns:
        The directory.

    Raises:
        UserError: what is missing and what to do.
    """
    path = model_directory(path)
    find_files(path, allow_pickle)
    return path


def check_weights(path: str | Path) -> ModelShape:
    """A model directory whose config and weight files agree, by the files' headers; what its config says.

    Raises:
        UserError: one line naming what is missing, damaged or of another size.
    """
    path = check_model_directory(path)
    shape = read_config(path)
    with ShardReader(path) as reader:
        check_tensors(reader, shape)
    return shape


def config_with_dtype(config_dict: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config with its dtype field(s) set, every other field as it was, in the same order."""
    text = {known: name for name, known in DTYPES.items()}.get(dtype)
    if text is None:
        raise UserError(f"dtype {dtype} is not one to export weights in; use one of {', '.join(DTYPES)}")
    keys = [key for key in ("dtype", "torch_dtype") if key in config_dict] or ["torch_dtype"]
    return config_dict | dict.fromkeys(keys, text)


@contextmanager
def export_directory(destination: str | Path, *, lineage: dict[str, Any], **begin: Any) -> Iterator[ShardWriter]:
    """A complete Hugging Face directory by one process: the body writes every tensor into the writer it is given.

    Args:
        destination: where the model shall be; replaced at the end when it is not empty and `force` is given.
        lineage: where the weights come from, JSON-able; written into the model card.
        **begin: as `begin_export`.

    Raises:
        UserError: one line; nothing is left behind, and an older destination is untouched.
    """
    partial = begin_export(destination, **begin)
    size = begin.get("max_shard_bytes", DEFAULT_SHARD_BYTES)
    try:
        with ShardWriter(partial, hf_shapes(read_config(partial)), begin["dtype"], size, create=False) as writer:
            yield writer
        finish_export(partial, destination, written=writer.written, lineage=lineage)
    except BaseException:  # also Ctrl-C: nothing that looks like a model may stay
        discard(partial)
        raise


def begin_export(
    destination: str | Path,
    *,
    config_dict: dict[str, Any],
    source_dir: str | Path | None,
    dtype: torch.dtype,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    require_tokenizer: bool = True,
    chat: ChatFormat | None = None,
) -> Path:
    """Check destination, source and disk space, then lay out everything but the numbers.

    Args:
        destination: where the model shall be.
        config_dict: the config to write (`ModelShape.raw`); only its dtype is changed.
        source_dir: the model whose tokenizer, template, generation config and licence files are copied; None for none.
        dtype: of the weights written.
        max_shard_bytes: tensor bytes per weight file.
        force: replace a non-empty destination.
        require_tokenizer: refuse a source without a tokenizer.
        chat: the template and end of turn it was trained with; None leaves the source's.

    Returns:
        The hidden directory to open `ShardWriter(..., create=False)` on.

    Raises:
        UserError: one line; nothing is left behind.
    """
    target = Path(os.path.realpath(destination))
    config_dict = config_with_dtype(config_dict, dtype)
    shapes = hf_shapes(read_config(config_dict))
    files = companion_files(Path(source_dir), require_tokenizer) if source_dir is not None else []
    if source_dir is None and require_tokenizer:
        raise UserError(f"{target}: no source to copy the tokenizer from; name the model the weights started from")
    check_destination(target, source_dir, force)
    needed = total_bytes(shapes, dtype) + sum(file.stat().st_size for file, _ in files)
    partial = create_partial(target, needed, source_dir=source_dir, force=force)
    try:
        copy_companions(files, partial)
        carry_chat(partial, chat or ChatFormat(), config_dict)
        write_json(partial / "config.json", config_dict)
        ShardWriter(partial, shapes, dtype, max_shard_bytes)
    except BaseException as error:
        discard(partial)
        if isinstance(error, OSError):
            raise cannot_write(target, error) from error
        raise
    return partial


def finish_export(partial: Path, destination: str | Path, *, written: Iterable[str], lineage: dict[str, Any]) -> None:
    """Check that the export is complete, write its model card, make it durable and rename it into place.

    Args:
        partial: what `begin_export` returned.
        destination: as given to `begin_export`.
        written: names of all tensors written, by whichever process.
        lineage: as `export_directory`.

    Raises:
        UserError: a tensor is missing or unknown, or the files do not read back. The caller then calls `discard`.
    """
    shape = read_config(partial)
    written = list(written)
    names, expected = set(written), set(hf_shapes(shape))
    for twice in sorted(name for name in names if len(written) > len(names) and written.count(name) > 1):
        raise UserError(f"{destination}: {twice} was written by two processes; not exported")
    for missing in sorted(expected - names):
        raise UserError(f"{destination}: {missing} was never written ({len(expected - names)} missing); not exported")
    for unknown in sorted(names - expected):
        raise UserError(f"{destination}: {unknown} is not a tensor of this model; not exported")
    with ShardReader(partial) as reader:
        check_tensors(reader, shape)
    target = Path(os.path.realpath(destination))
    try:
        card = model_card(target.name, lineage, partial)
        (partial / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")  # half a surrogate
    except OSError as error:
        raise cannot_write(target, error) from error
    publish(partial, target)


def copy_companions(files: list[tuple[Path, Path]], destination: Path) -> None:
    """Copy what `companion_files` found."""
    for file, relative in files:
        (destination / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, destination / relative)


def companion_files(source: Path, require_tokenizer: bool) -> list[tuple[Path, Path]]:
    """Files of the source that are not weights: tokenizer, templates, generation config, licence; and their places.

    Raises:
        UserError: no such directory, or it holds no tokenizer although one is required.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such directory; the export copies tokenizer and chat template from it")
    if require_tokenizer and not any((source / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{source}: holds no tokenizer ({', '.join(TOKENIZER_FILES)}); put its files there")
    found = [source / name for name in (*TOKENIZER_FILES, *COMPANION_FILES)]
    for pattern in COMPANION_PATTERNS:
        found += sorted(source.glob(pattern))
    found = [file for file in found if file.is_file()]
    for file in found:
        if not os.access(file, os.R_OK):
            raise UserError(f"{file}: cannot be read; change its permissions, or copy the directory without it")
    return [(file, file.relative_to(source)) for file in found]
