"""Hugging Face directory <-> Megatron distributed checkpoint: one process, no GPU, no process group, in small windows.

A checkpoint written here carries the model's config, tokenizer and templates, so that the way back needs nothing else:

    DESTINATION/latest_checkpointed_iteration.txt
    DESTINATION/iter_0000000/                 stock GPTModel keys, for any TP/PP and either layer spec
                                              (checkpoint/torch_dist.py); manifest.json covers its files
    DESTINATION/hf/                           config.json, tokenizer, chat template, generation config, licence
    DESTINATION/lineage.json                  where the weights come from
    DESTINATION/megatron_lm_flags.txt         the flags with which Megatron-LM computes the same

Legend: V vocabulary, H hidden, F feed-forward width, L layers.
"""

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

import fuserl_megatron
from fuserl_megatron.checkpoint.manifest import describe, write_manifest
from fuserl_megatron.checkpoint.reader import DistReader
from fuserl_megatron.checkpoint.torch_dist import LAYERS, POINTER, DistWriter, iteration_directory
from fuserl_megatron.convert import hf_io
from fuserl_megatron.convert.copying import MAX_THREADS, Window, all_finite, in_parts, warn_of
from fuserl_megatron.convert.hf_config import DTYPES, ModelShape, read_config
from fuserl_megatron.convert.layout import padded_vocab_size, row_runs
from fuserl_megatron.convert.megatron_checkpoint import (
    check_checkpoint,
    checkpoint_key,
    find_checkpoint,
    stored_key,
    widest,
)
from fuserl_megatron.convert.megatron_lm import FLAGS_FILE, flags_text
from fuserl_megatron.convert.names import find_rule, hf_shapes
from fuserl_megatron.convert.shard_writer import DEFAULT_SHARD_BYTES, converted, total_bytes
from fuserl_megatron.convert.shards import ShardReader, ShardWriter, check_tensors
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import write_json
from fuserl_megatron.util.whole_directory import check_destination, whole_directory

# modules whose extra state core asks for when it loads under the local spec; under the other spec they are the same
_WITH_EXTRA_STATE = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def hf_to_megatron(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    make_vocab_size_divisible_by: int = 128,
    force: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """Write a Hugging Face model as a Megatron checkpoint of iteration 0.

    Args:
        source: model directory with config, weights and tokenizer.
        destination: the checkpoint's root folder.
        dtype: of the weights written; None keeps the source's (the widest, should the files mix several).
        make_vocab_size_divisible_by: the vocabulary is padded with zero rows to a multiple of this. Core cuts and pads
            again for the layout that loads it.
        force: replace a non-empty destination.
        allow_pickle: also read `pytorch_model.bin`, with torch's weights-only loader.

    Returns:
        The destination.

    Raises:
        UserError: one line; nothing is left behind, and an older destination is untouched.
    """
    source = hf_io.check_model_directory(source, allow_pickle)
    if make_vocab_size_divisible_by < 1:
        raise UserError(f"make_vocab_size_divisible_by = {make_vocab_size_divisible_by} must be positive; 128 is usual")
    shape = read_config(source)
    if shape.attention_out_bias != shape.mlp_bias:
        raise UserError(
            f"{source}: attention_bias = {shape.attention_out_bias} with mlp_bias = {shape.mlp_bias} is not supported: "
            "core has one switch for the biases of the output projection and the MLP"
        )
    companions = hf_io.companion_files(source, require_tokenizer=True)
    with ShardReader(source, allow_pickle) as reader:
        check_tensors(reader, shape)
        number = _dtype(dtype) or widest(reader.stored(name).dtype for name in hf_shapes(shape))
        padded = padded_vocab_size(shape.vocab_size, 1, make_vocab_size_divisible_by)
        padding = (padded - shape.vocab_size) * shape.hidden_size * number.itemsize
        needed = total_bytes(hf_shapes(shape), number) + (1 if shape.tie_word_embeddings else 2) * padding
        needed += sum(file.stat().st_size for file, _ in companions) + 2500 * 8 * (shape.num_layers + 2)
        with whole_directory(destination, needed_bytes=needed, source_dir=source, force=force) as partial:
            hf_io.copy_companions(companions, partial / "hf")
            write_json(partial / "hf" / "config.json", shape.raw)
            lineage = {"target": str(source), "written_by": f"fuserl-megatron {fuserl_megatron.__version__}"}
            write_json(partial / "lineage.json", lineage)
            (partial / FLAGS_FILE).write_text(flags_text(shape, number, destination), encoding="utf-8")
            folder = iteration_directory(partial, 0)
            _write_iteration(folder, reader, shape, number, padded)
            with DistReader(folder) as written:
                check_checkpoint(written, shape)
            write_manifest(folder, 0, describe(sorted(folder.iterdir())))
            (partial / POINTER).write_text("0\n")
    return Path(destination)


def _write_iteration(folder: Path, reader: ShardReader, shape: ModelShape, dtype: torch.dtype, padded: int) -> None:
    not_finite: set[str] = set()

    def write_part(number: int, names: list[str], window: Window) -> DistWriter:
        with DistWriter(folder, rank=number) as writer:
            for name in names:
                for chunk in _chunks(name, shape, padded):
                    not_finite.update(_write_chunk(writer, reader, window, shape, name, *chunk, dtype))
            for layer in range(shape.num_layers) if number == 0 else ():
                for module in _WITH_EXTRA_STATE:
                    writer.object(f"{LAYERS}{module}._extra_state/shard_{layer}_{shape.num_layers}", [None])
        return writer

    first, *others = in_parts(shape, write_part, 1 if reader.pickled else MAX_THREADS)
    arguments = _megatron_arguments(shape, dtype, padded)
    common = {"iteration": 0, "checkpoint_version": 3.0, "args": arguments}
    first.finish(common, [writer.index for writer in others])
    warn_of(not_finite, reader.directory)


def _chunks(name: str, shape: ModelShape, padded: int) -> Iterator[tuple[list[tuple[str, int, int, int]], int, int]]:
    """How one parameter is cut: (runs of rows, rows of the parameter, rows of this chunk). Rows in no run stay zero."""
    runs, rule = row_runs(name, shape), find_rule(name)[0].rule
    total = padded if rule == "vocab" else sum(count for *_, count in runs)
    if rule == "gate_up":  # a chunk each, as in core: a tensor-parallel rank takes a part of both
        yield from (([run], total, run[3]) for run in runs)
    else:
        yield runs, total, total


def _write_chunk(
    writer: DistWriter,
    reader: ShardReader,
    window: Window,
    shape: ModelShape,
    name: str,
    runs: list[tuple[str, int, int, int]],
    total: int,
    held: int,
    dtype: torch.dtype,
) -> set[str]:
    """One chunk of a parameter of `total` rows: `held` of them, from the first run's first row on. Returns the Hugging
    Face tensors in which a number is not finite."""
    not_finite = set()
    key, layer = checkpoint_key(name)
    rest, first = reader.stored(runs[0][0]).shape[1:], runs[0][2]
    size, offsets, sizes = (total, *rest), (first, *[0] * len(rest)), (held, *rest)
    if layer is not None:
        size, offsets, sizes = (shape.num_layers, *size), (layer, *offsets), (1, *sizes)
    place, row_bytes = writer.reserve(key, size, offsets, sizes, dtype), math.prod(rest) * dtype.itemsize
    for hf, start, at, count in runs:
        for row, out in window.pieces(count, rest, reader.stored(hf).dtype):
            reader.read(hf, 0, start + row, start + row + len(out), out=out)
            writer.write(place + (at - first + row) * row_bytes, converted(out, dtype, hf))
            if not all_finite(out):
                not_finite.add(hf)
    return not_finite


def _megatron_arguments(shape: ModelShape, dtype: torch.dtype, padded: int) -> argparse.Namespace:
    """What Megatron-LM reads from a checkpoint instead of its command line (--use-checkpoint-args)."""
    return argparse.Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        group_query_attention=True,
        kv_channels=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        seq_length=shape.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=True,
        rotary_base=shape.rope.theta,
        rotary_percent=shape.rotary_dim / shape.head_dim,
        rotary_interleaved=False,
        normalization="RMSNorm",
        norm_epsilon=shape.rms_norm_eps,
        swiglu=shape.traits.activation == "silu",
        add_bias_linear=shape.mlp_bias,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        untie_embeddings_and_output_weights=not shape.tie_word_embeddings,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        padded_vocab_size=padded,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
    )


def megatron_to_hf(
    source: str | Path,
    destination: str | Path,
    *,
    hf: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
) -> Path:
    """Write the model of a Megatron checkpoint (of any layout, with or without optimizer) as a Hugging Face directory.

    Args:
        source: as `find_checkpoint`.
        destination: the model directory to write.
        hf: directory with config.json and tokenizer; None takes what the checkpoint or the run's config names.
        dtype: of the weights written; None keeps the checkpoint's.
        max_shard_bytes: tensor bytes per weight file.
        force: replace a non-empty destination.

    Returns:
        The destination.

    Raises:
        UserError: one line; nothing is left behind, and an older destination is untouched.
    """
    found = find_checkpoint(source, hf)
    # export_directory only protects tokenizer_dir
    check_destination(Path(os.path.realpath(destination)), found.folder, force)
    shape = read_config(found.config_dir)
    with DistReader(found.folder) as reader:
        stored = check_checkpoint(reader, shape)
        with hf_io.export_directory(
            destination,
            config_dict=shape.raw,
            source_dir=found.tokenizer_dir,
            lineage=found.lineage,
            chat=found.chat,
            dtype=_dtype(dtype) or stored,
            max_shard_bytes=max_shard_bytes,
            force=force,
        ) as writer:
            _write_hf(writer, reader, shape)
    return Path(destination)


def _write_hf(writer: ShardWriter, reader: DistReader, shape: ModelShape) -> None:
    not_finite: set[str] = set()

    def write_part(_: int, names: list[str], window: Window) -> None:
        for name in names:
            key, layer = stored_key(reader, name)
            stored = reader.keys[key]
            rest = stored.size[1 if layer is None else 2 :]
            for hf, start, at, count in row_runs(name, shape):
                for row, out in window.pieces(count, rest, stored.dtype):
                    writer.write_rows(hf, start + row, reader.read_rows(key, layer, at + row, out))
                    if not all_finite(out):
                        not_finite.add(hf)

    in_parts(shape, write_part)
    warn_of(not_finite, reader.directory)


def _dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise UserError(f"dtype {name}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]
