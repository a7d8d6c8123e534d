"""Weights into and out of the model-parallel ranks: every rank reads only its own slices; export gathers one tensor
at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps

from fuserl_megatron.config.schema import UserError
from fuserl_megatron.convert.hf_io import export_directory
from fuserl_megatron.convert.layout import hf_tensors_from_megatron, unshard
from fuserl_megatron.convert.names import find_rule, local_name, megatron_names
from fuserl_megatron.convert.shards import ShardReader, check_tensors, read_parameter
from fuserl_megatron.mcore.model import TargetModel
from fuserl_megatron.mcore.parallel import Layout, from_main_rank


def named_parameters(target: TargetModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under the local spec's names with global layer indices (layers count from 0)."""
    for chunk in target.chunks:
        layers = chunk.decoder.layers
        offset = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                index, rest = name.removeprefix("decoder.layers.").split(".", 1)
                name = f"decoder.layers.{int(index) + offset}.{rest}"
            yield local_name(name), parameter


@torch.no_grad()
def load_hf_weights(target: TargetModel, directory: str, layout: Layout) -> None:
    """Fill this rank's parameters from a Hugging Face directory, reading only the rows and columns it holds.

    Raises:
        UserError: the directory's tensors are not those its config promises; a file is missing or damaged.
    """
    with ShardReader(directory) as reader:
        check_tensors(reader, target.shape)
        for name, parameter in named_parameters(target):
            value = read_parameter(
                reader, target.shape, name, layout.tp_size, layout.tp_rank, padded_vocab=target.padded_vocab
            )
            assert value.shape == parameter.shape, (
                f"{name}: read {tuple(value.shape)}, expected {tuple(parameter.shape)}"
            )
            parameter.copy_(value)


@torch.no_grad()
def load_checkpoint_weights(target: TargetModel, folder: str | Path) -> None:
    """Fill this rank's parameters from the folder of one iteration of a Megatron checkpoint, whatever layout wrote it.

    Raises:
        UserError: the checkpoint does not fit the model or cannot be read.
    """
    metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    state = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(target.chunks)}
    try:
        state = dist_checkpointing.load(state, str(folder))
    except Exception as error:  # damaged files surface as many kinds of errors
        text = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{folder}: cannot be loaded ({type(error).__name__}: {text[0]}); is it of this model?"
        ) from error
    for i, chunk in enumerate(target.chunks):
        chunk.load_state_dict(state[f"model{i}"])


@torch.no_grad()
def gather_hf_tensors(
    target: TargetModel, layout: Layout, value: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach
) -> Iterator[tuple[str, torch.Tensor]]:
    """All Hugging Face tensors in export order, on rank 0's CPU; the other ranks take part and get nothing.

    Peak extra memory is one full parameter. Every rank must exhaust the iterator.

    Args:
        target: the model.
        layout: this rank's place.
        value: what to gather of each parameter, in its shape; the weights unless said (main_grad for gradients).
    """
    held = dict(named_parameters(target))
    tp_group = ps.get_tensor_model_parallel_group()
    for name in megatron_names(target.shape):
        parameter = held.get(name) if layout.dp_rank == 0 and layout.cp_rank == 0 else None
        full = None
        if parameter is not None:
            full = _gather_over_tp(name, value(parameter), tp_group, layout)
        full = _to_rank_zero(full if layout.tp_rank == 0 else None, layout)
        if layout.is_main:
            yield from hf_tensors_from_megatron(name, full, target.shape)


def _gather_over_tp(name: str, part: torch.Tensor, group: dist.ProcessGroup, layout: Layout) -> torch.Tensor | None:
    if layout.tp_size == 1 or find_rule(name)[0].split == "none":
        return part
    parts = [torch.empty_like(part) for _ in range(layout.tp_size)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return unshard(parts, name) if layout.tp_rank == 0 else None


def _to_rank_zero(full: torch.Tensor | None, layout: Layout) -> torch.Tensor | None:
    """Send the tensor from the lowest rank that holds it to rank 0."""
    holder = torch.tensor([layout.rank if full is not None else layout.world_size], device=layout.device)
    dist.all_reduce(holder, op=dist.ReduceOp.MIN)
    source = int(holder)
    if source == 0:
        return full.cpu() if layout.is_main else None
    if layout.rank == source:
        dist.broadcast_object_list([(tuple(full.shape), full.dtype)], src=source)
        dist.send(full.contiguous(), dst=0)
        return None
    described = [None]
    dist.broadcast_object_list(described, src=source)
    if not layout.is_main:
        return None
    shape, dtype = described[0]
    received = torch.empty(shape, dtype=dtype, device=layout.device)
    dist.recv(received, src=source)
    return received.cpu()


def export_hf(target: TargetModel, layout: Layout, destination: str, *, source_dir: str, lineage: dict) -> None:
    """Write the trained weights as a Hugging Face directory, in the number format they were trained in. All ranks
    call it.

    Raises:
        UserError: on every rank, when rank 0 could not write; nothing half-written is left.
    """
    tensors = gather_hf_tensors(target, layout)
    problem = None
    if layout.is_main:
        try:
            export_directory(
                destination,
                config_dict=target.shape.raw,
                tensors=tensors,
                source_dir=source_dir,
                lineage=lineage,
                dtype=target.config.params_dtype,
                force=True,
            )
        except (UserError, OSError) as error:
            problem = str(error)
    for _ in tensors:  # the other ranks, and rank 0 after a failure, take part in every gather to the end
        pass
    problem = from_main_rank(problem, layout.device)
    if problem:
        raise UserError(problem)
