"""Weights into and out of the model-parallel ranks: every rank reads only its own slices, and every rank writes its
share of an export, one tensor at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps

from fuserl_megatron.convert.chat_files import ChatFormat
from fuserl_megatron.convert.hf_io import begin_export, finish_export
from fuserl_megatron.convert.layout import hf_tensors_from_megatron, unshard
from fuserl_megatron.convert.names import find_rule, hf_shapes, local_name, megatron_names
from fuserl_megatron.convert.shard_writer import DEFAULT_SHARD_BYTES
from fuserl_megatron.convert.shards import ShardReader, ShardWriter, check_tensors, read_parameter
from fuserl_megatron.mcore import lora
from fuserl_megatron.mcore.model import TargetModel
from fuserl_megatron.mcore.parallel import Layout
from fuserl_megatron.mcore.precision import fill, plain
from fuserl_megatron.runtime.collectives import from_all_ranks, on_main_rank
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.whole_directory import discard


def named_parameters(target: TargetModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under the local spec's names with global layer indices (layers count from 0), an adapter's
    left out."""
    for chunk in target.chunks:
        layers = chunk.decoder.layers
        offset = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in chunk.named_parameters():
            if name.startswith(f"{lora.NAME}."):
                continue
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
            fill(parameter, value)


@torch.no_grad()
def gather_hf_tensors(
    target: TargetModel, layout: Layout, value: Callable[[torch.nn.Parameter], torch.Tensor] = plain
) -> Iterator[tuple[str, torch.Tensor]]:
    """All Hugging Face tensors in export order, on rank 0's CPU; the other ranks take part and get nothing.

    `value` says what to gather of each parameter, in its shape (main_grad for gradients). Peak extra memory is one full
    parameter and its pickle. Every rank must exhaust the iterator.
    """
    held = dict(named_parameters(target))
    tp_group = ps.get_tensor_model_parallel_group()
    for name in megatron_names(target.shape):
        parameter = held.get(name) if layout.dp_rank == 0 and layout.cp_rank == 0 else None
        full = None
        if parameter is not None:
            full = _gather_over_tp(name, value(parameter), tp_group, layout)
        full = _to_rank_zero(full, layout)
        if layout.is_main:
            assert full is not None
            yield from hf_tensors_from_megatron(name, full, target.shape)


def _gather_over_tp(
    name: str, part: torch.Tensor, group: dist.ProcessGroup, layout: Layout, holder: int = 0
) -> torch.Tensor | None:
    """The whole parameter on one tensor-parallel rank, the holder; None on the others."""
    if layout.tp_size == 1 or find_rule(name)[0].rule == "plain":
        return part if layout.tp_rank == holder else None
    parts = [torch.empty_like(part) for _ in range(layout.tp_size)] if layout.tp_rank == holder else None
    dist.gather(part.contiguous(), parts, dst=dist.get_global_rank(group, holder), group=group)
    return None if parts is None else unshard(parts, name)


def _to_rank_zero(full: torch.Tensor | None, layout: Layout) -> torch.Tensor | None:
    """Send the tensor from the lowest rank that holds it to rank 0."""
    holder = torch.tensor([layout.rank if full is not None else layout.world_size], device=layout.device)
    dist.all_reduce(holder, op=dist.ReduceOp.MIN)
    source = int(holder)
    box = [full.cpu() if full is not None and layout.rank == source else None]
    if source and layout.rank == source:
        dist.send_object_list(box, dst=0, device=layout.device)
    elif source and layout.is_main:
        dist.recv_object_list(box, src=source, device=layout.device)
    return box[0] if layout.is_main else None


def export_hf(
    target: TargetModel,
    layout: Layout,
    destination: str | Path,
    *,
    source_dir: str | Path,
    lineage: dict,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    chat: ChatFormat | None = None,
) -> None:
    """Write the trained weights, an adapter merged in, as a Hugging Face directory, in the number format they were
    trained in. All ranks
    call it and all write: the parameters of a pipeline stage go round its tensor- and data-parallel ranks, and who
    writes one gathers it. Memory: one parameter and its parts. source_dir, lineage and chat: as `begin_export`.

    Raises:
        UserError: on every rank, when one of them could not write; nothing half-written is left, and an older
            destination is untouched.
    """

    def begin() -> Path:
        return begin_export(
            destination,
            config_dict=target.shape.raw,
            source_dir=source_dir,
            dtype=target.config.params_dtype,
            max_shard_bytes=max_shard_bytes,
            force=True,
            chat=chat,
        )

    def finish() -> None:
        problem = next((problem for _, problem in outcomes if problem), None)
        if problem:
            raise UserError(problem)
        names = [name for written, _ in outcomes for name in written]
        finish_export(partial, destination, written=names, lineage=lineage)

    partial = on_main_rank(layout, begin)
    try:
        outcomes = from_all_ranks(_write_own_part(target, layout, partial, max_shard_bytes))
        on_main_rank(layout, finish)
    except BaseException:  # also a rank that died, and Ctrl-C
        if layout.is_main:
            discard(partial)
        raise


@torch.no_grad()
def _write_own_part(
    target: TargetModel, layout: Layout, partial: Path, max_shard_bytes: int
) -> tuple[list[str], str | None]:
    """The Hugging Face tensors this rank wrote, and what went wrong here. After a failure the rank goes on taking part
    in the gathers of its neighbours."""
    problem, tp_group, value = None, ps.get_tensor_model_parallel_group(), lora.merged(target)
    replicas, replica = layout.dp_size * layout.cp_size, layout.dp_rank * layout.cp_size + layout.cp_rank
    writer = ShardWriter(partial, hf_shapes(target.shape), target.config.params_dtype, max_shard_bytes, create=False)
    try:
        with writer:
            for i, (name, parameter) in enumerate(named_parameters(target)):
                if i % replicas != replica:
                    continue
                full = _gather_over_tp(name, value(parameter), tp_group, layout, i // replicas % layout.tp_size)
                if full is None or problem:
                    continue
                try:
                    for hf, tensor in hf_tensors_from_megatron(name, full, target.shape):
                        writer.write(hf, tensor)
                except (UserError, OSError) as error:
                    problem = str(error)
    except (UserError, OSError) as error:  # the last flush to the device
        problem = problem or str(error)
    return sorted(writer.written), problem
