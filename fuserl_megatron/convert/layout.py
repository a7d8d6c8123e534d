"""How tensors are laid out: pure functions in both directions, exact inverses of one another.

"Full" below is Megatron's layout without tensor parallelism; a "shard" is what one tensor-parallel rank holds. No
arithmetic is done on the numbers: they are moved, so every direction is exact to the bit.

    linear_qkv   HF  q [A*D, H], k [G*D, H], v [G*D, H]
                 ->  per group g: its A/G query heads, then its key head, then its value head; ranks hold whole groups
    linear_fc1   HF  gate [F, H], up [F, H]
                 ->  full [gate; up]; rank r holds [gate_r; up_r], which is not a contiguous cut of the full tensor
    vocabulary   rows padded with zeros to a multiple that tensor parallelism divides; the padding never leaves Megatron

Legend: A attention heads, G key/value groups, D head dimension, H hidden, F feed-forward width, V vocabulary.
"""

from collections.abc import Sequence

import torch

from fuserl_megatron.convert.hf_config import ModelShape
from fuserl_megatron.convert.names import find_rule, hf_names, hf_parts, lengths
from fuserl_megatron.util.errors import UserError


def merge_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """Interleave query, key and value by group.

    Args:
        q: [A*D, H] weight or [A*D] bias, of all groups or of any run of whole groups.
        k: [G*D, ...] of the same groups.
        v: as k.
        shape: gives D and the query heads per group.

    Returns:
        [G*(A/G + 2)*D, ...], a new tensor.
    """
    D, rest = shape.head_dim, q.shape[1:]
    groups = k.shape[0] // D
    parts = (part.reshape(groups, -1, *rest) for part in (q, k, v))
    return torch.cat(tuple(parts), dim=1).reshape(groups * (shape.heads_per_group + 2) * D, *rest)


def split_qkv(qkv: torch.Tensor, shape: ModelShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `merge_qkv`: [G*(A/G + 2)*D, ...] into contiguous q [A*D, ...], k [G*D, ...], v [G*D, ...]."""
    D, rest, queries = shape.head_dim, qkv.shape[1:], shape.heads_per_group * shape.head_dim
    grouped = qkv.reshape(-1, queries + 2 * D, *rest)
    return tuple(part.reshape(-1, *rest) for part in grouped.split([queries, D, D], dim=1))


def padded_vocab_size(vocab_size: int, tp_size: int, divisible_by: int = 1) -> int:
    """The smallest size >= vocab_size that is a multiple of divisible_by * tp_size (Megatron's rule)."""
    step = divisible_by * tp_size
    return -(-vocab_size // step) * step


def _cut(length: int, tp_size: int, tp_rank: int, what: str) -> tuple[int, int]:
    if length % tp_size or not 0 <= tp_rank < tp_size:
        raise UserError(f"{what}: {length} does not divide over {tp_size} tensor-parallel ranks (rank {tp_rank})")
    step = length // tp_size
    return tp_rank * step, (tp_rank + 1) * step


def unshard(shards: Sequence[torch.Tensor], megatron_name: str) -> torch.Tensor:
    """The full Megatron tensor from every tensor-parallel rank's part, in rank order."""
    rule = find_rule(megatron_name)[0].rule
    if rule == "plain" or len(shards) == 1:
        return shards[0]
    if rule == "gate_up":
        gates, ups = zip(*(part.chunk(2) for part in shards), strict=True)
        return torch.cat((*gates, *ups))
    return torch.cat(tuple(shards), dim=1 if rule == "row" else 0)


def hf_cuts(megatron_name: str, shape: ModelShape, tp_size: int, tp_rank: int) -> list[tuple[str, int, int, int]]:
    """What one rank must read of each Hugging Face tensor, for every rule but vocab.

    Returns:
        (hf name, dimension, start, stop) in layout order; the whole of dimension 0 for a parameter every rank holds.

    Raises:
        UserError: the parameter does not divide over the ranks.
    """
    row, _ = find_rule(megatron_name)
    dim = 1 if row.rule == "row" else 0
    cuts = []
    for (name, offset, _), letters in zip(hf_parts(megatron_name, shape), row.sizes, strict=True):
        parts = length = lengths(shape)[letters[dim]]
        start, stop = 0, length
        if row.rule != "plain":
            what = megatron_name
            if letters[dim] in ("AD", "GD"):  # heads are cut between groups, in linear_proj in step with linear_qkv
                parts, what = shape.num_query_groups, f"{megatron_name} (key/value heads)"
            start, stop = (bound * (length // parts) for bound in _cut(parts, tp_size, tp_rank, what))
        cuts.append((name, dim, offset + start, offset + stop))
    return cuts


def row_runs(megatron_name: str, shape: ModelShape) -> list[tuple[str, int, int, int]]:
    """One full Megatron parameter as runs of rows of its Hugging Face tensors: conversion as a list of copies.

    Returns:
        (hf name, its first row, Megatron's first row, number of rows), in the order of Megatron's rows. Padded rows of
        the vocabulary are in no run.

    Raises:
        ValueError: the name is unknown to the table or to this model.
    """
    row, _ = find_rule(megatron_name)
    parts, D = hf_parts(megatron_name, shape), shape.head_dim
    if row.rule != "qkv":
        return [(name, first, i * rows, rows) for i, (name, first, rows) in enumerate(parts)]
    runs, at = [], 0
    for group in range(shape.num_query_groups):
        for (name, first, _), width in zip(parts, (shape.heads_per_group * D, D, D), strict=True):
            runs.append((name, first + group * width, at, width))
            at += width
    return runs


def hf_tensors_from_megatron(
    megatron_name: str, full: torch.Tensor, shape: ModelShape
) -> list[tuple[str, torch.Tensor]]:
    """Turn one full Megatron parameter back into its Hugging Face tensors; padded vocabulary rows are cut off.

    Returns:
        [(hf name, tensor)], views where possible. Empty for the tied copy `output_layer.weight`, which the embedding
        stands for.

    Raises:
        ValueError: the name is unknown to the table or to this model.
    """
    row, _ = find_rule(megatron_name)
    names = hf_names(megatron_name, shape)
    if row.megatron == "output_layer.weight" and shape.tie_word_embeddings:
        return []
    parts: Sequence[torch.Tensor]
    if row.rule == "qkv":
        parts = split_qkv(full, shape)
    elif row.rule == "gate_up":
        parts = full.chunk(2)
    elif row.rule == "vocab":
        parts = (full[: shape.vocab_size],)
    else:
        parts = (full,)
    if len(set(names)) < len(names):  # one tensor holds them all
        return [(names[0], torch.cat(tuple(parts)))]
    return list(zip(names, parts, strict=True))
