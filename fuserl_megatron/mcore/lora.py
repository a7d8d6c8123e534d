"""LoRA on core's column- and row-parallel linear layers: y = W x + scale * B A x, W frozen.

The adapters are modules of their own beside the model's (chunk.adapters) and come in through forward hooks of the
linear layers, so that core's layers, their names and their checkpoints stay as they are. What tensor parallelism asks
for, with T ranks; sums over T are of low rank [S, B, r], never of the hidden size:

    column (q k v, gate up)   A whole, B cut along its rows. h = A x on every rank. The gradient of h is summed over T:
                              each rank's rows of B see a part of it. With sequence parallelism x is a rank's share of
                              the tokens: h is gathered, its gradient reduced and scattered, and A's gradient is then of
                              those tokens alone (core sums what is marked sequence_parallel).
    row (o, down)             A cut along its columns, B whole. h is the sum of the ranks' A x. With sequence
                              parallelism h is reduced and scattered over the tokens, and B's gradient is of a share.

Legend: S tokens, B rows, r rank of the adapter, H inputs, N outputs of a rank.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from fuserl_megatron.config.adapter_section import AdapterConfig
from fuserl_megatron.convert.layout import merge_qkv
from fuserl_megatron.convert.names import lengths
from fuserl_megatron.convert.peft import TARGETS, AdapterReader, Factor, factors
from fuserl_megatron.mcore.model import TargetModel
from fuserl_megatron.mcore.parallel import Layout
from fuserl_megatron.mcore.precision import plain

NAME = "adapters"
"""Of the module in a chunk, and the first word of its parameters."""


class Adapter(torch.nn.Module):
    """The factors beside one linear layer of core, of one target or several fused ones."""

    def __init__(
        self, target: TargetModel, config: AdapterConfig, layer: int, name: str, linear: torch.nn.Module, layout: Layout
    ):
        """Without values yet. `linear` is the layer, which core calls `name`."""
        super().__init__()
        weight: Any = linear.weight
        self.beside = (linear,)  # in a tuple: torch would take it for a part of this module
        self.shape = shape = target.shape
        self.rank, self.scale, self.is_on = config.rank, config.scale, True
        self.sequence_parallel = target.config.sequence_parallel
        self.widths: dict[str, int] = {}
        self.factors: dict[str, Factor] = {}
        for module, row in TARGETS.items():
            if row.linear != name:
                continue
            self.rule = row.rule
            self.widths[module] = lengths(shape)[row.sizes[0]] // (1 if row.rule == "row" else layout.tp_size)
            if module not in config.targets:
                continue
            for letter, factor in zip("AB", factors(shape, config.rank, layer, module), strict=True):
                rows, columns = factor.part(layout.tp_size, 0)
                size = rows.stop, columns.stop
                parameter: Any = torch.nn.Parameter(torch.empty(size, dtype=weight.dtype, device=weight.device))
                if factor.cut is not None:
                    set_tensor_model_parallel_attributes(parameter, True, factor.cut, 1)
                # computed from a share of the tokens: core sums its gradient over the tensor-parallel ranks
                parameter.sequence_parallel = factor.cut is None and self.sequence_parallel
                self.register_parameter(f"{module}_{letter}", parameter)
                self.factors[f"{module}_{letter}"] = factor
        self.targets: list[str] = [module for module in self.widths if module in config.targets]

    def named_factors(self) -> Iterator[tuple[Factor, torch.nn.Parameter]]:
        """Each with this rank's part of it."""
        for name, factor in self.factors.items():
            yield factor, self.get_parameter(name)

    def _of(self, letter: str) -> list[torch.Tensor]:
        return [self.get_parameter(f"{target}_{letter}") for target in self.targets]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[S, B, H] of this rank -> what is added to the layer's output, [S, B, N]."""
        a, b = self._of("A"), self._of("B")
        low = F.linear(x, torch.cat(a) if len(a) > 1 else a[0]) * self.scale
        if self.rule == "row":
            return F.linear(self._summed(low), b[0])
        low = self._given_to_all(low)
        parts = dict(zip(self.targets, map(F.linear, low.split(self.rank, -1), b), strict=True))
        whole = [
            parts[name] if name in parts else low.new_zeros(*low.shape[:-1], width)
            for name, width in self.widths.items()
        ]
        if self.rule == "qkv":  # by group, as layout.merge_qkv has the rows of the weight
            groups = self.widths["k_proj"] // self.shape.head_dim
            return torch.cat([part.unflatten(-1, (groups, -1)) for part in whole], -1).flatten(-2)
        return torch.cat(whole, -1)

    def _given_to_all(self, low: torch.Tensor) -> torch.Tensor:
        """Column-parallel: every rank's rows of B read it, and the gradients they give are summed."""
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
        return copy_to_tensor_model_parallel_region(low)

    def _summed(self, low: torch.Tensor) -> torch.Tensor:
        """Row-parallel: each rank has read its columns of the input."""
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low)
        return reduce_from_tensor_model_parallel_region(low)

    @torch.no_grad()
    def product(self) -> torch.Tensor:
        """What merging adds to this rank's part of the layer's weight, scale * B A in fp32 (float64 of float64)."""
        wide = torch.float64 if self._of("A")[0].dtype == torch.float64 else torch.float32
        ab = zip(self._of("A"), self._of("B"), strict=True)
        parts = {target: self.scale * b.to(wide) @ a.to(wide) for target, (a, b) in zip(self.targets, ab, strict=True)}
        first = next(iter(parts.values()))
        whole = [parts.get(name, first.new_zeros(width, first.shape[1])) for name, width in self.widths.items()]
        if self.rule != "qkv":
            return torch.cat(whole)
        q, k, v = whole
        return merge_qkv(q, k, v, self.shape)


def add_adapters(target: TargetModel, config: AdapterConfig, layout: Layout, seed: int) -> None:
    """Freeze the model and put an adapter beside each linear layer that holds a target, with its first values: those in
    adapter.path, otherwise uniform in +-1/sqrt(inputs) for A, as in PEFT, and 0 for B. They depend on the seed and on a
    factor's name, not on the layout.

    Raises:
        UserError: adapter.path does not fit.
    """
    reader = AdapterReader(config.path, target.shape, config) if config.path is not None else None
    linears = dict.fromkeys(TARGETS[name].linear for name in TARGETS if name in config.targets)
    for chunk in target.chunks:
        chunk.requires_grad_(False)
        adapters = torch.nn.ModuleList()
        for layer in chunk.decoder.layers:
            for name in linears:
                linear = layer.get_submodule(name)
                adapter = Adapter(target, config, layer.layer_number - 1, name, linear, layout)
                linear.register_forward_hook(_adding(adapter))
                for factor, parameter in adapter.named_factors():
                    value = reader.read(factor) if reader else first_value(factor, seed)
                    parameter.data.copy_(value[factor.part(layout.tp_size, layout.tp_rank)])
                adapters.append(adapter)
        chunk.add_module(NAME, adapters)
        if chunk.pre_process:
            # recomputed layers give no gradients to what is inside unless their input asks for one
            chunk.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


def _adding(adapter: Adapter) -> Callable:
    def hook(linear, inputs, output):
        if not adapter.is_on:
            return None
        x, (y, bias) = inputs[0], output
        norm = getattr(linear, "layer_norm_weight", None)
        if norm is not None:  # Transformer Engine's layer begins with the norm
            x = F.rms_norm(x.float(), x.shape[-1:], norm.float(), linear.eps).to(x.dtype)
        return y + adapter(x), bias

    return hook


def first_value(factor: Factor, seed: int) -> torch.Tensor:
    """A whole factor's value before the first step, fp32."""
    if ".lora_B." in factor.name:
        return torch.zeros(factor.size)
    digest = hashlib.sha256(f"{seed} {factor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = 1 / math.sqrt(factor.size[1])
    return torch.empty(factor.size).uniform_(-bound, bound, generator=generator)


def adapters_of(target: TargetModel) -> list[Adapter]:
    """This rank's; none where all weights are trained."""
    return [adapter for chunk in target.chunks for adapter in getattr(chunk, NAME, ())]


@contextlib.contextmanager
def off(target: TargetModel) -> Iterator[None]:
    """Inside, the model is the one that it started from."""
    for adapter in adapters_of(target):
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in adapters_of(target):
            adapter.is_on = True


def merged(target: TargetModel) -> Callable[[torch.nn.Parameter], torch.Tensor]:
    """What gives a parameter of the model with its adapter's product added, added up in fp32 and rounded once."""
    of = {id(adapter.beside[0].weight): adapter for adapter in adapters_of(target)}

    def value(parameter: torch.nn.Parameter) -> torch.Tensor:
        weight = plain(parameter)
        adapter = of.get(id(parameter))
        return weight if adapter is None else (weight + adapter.product()).to(weight.dtype)

    return value


def sharded_state(chunk: torch.nn.Module) -> dict[str, ShardedTensor]:
    """Core's description of the adapters of a chunk, for checkpoints: a factor is one tensor under PEFT's name, cut as
    tensor parallelism cuts it, so that any other layout reads it."""
    tp_size, tp_rank = ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_rank()
    replica = ps.get_data_parallel_rank(with_context_parallel=True)
    state = {}
    for adapter in getattr(chunk, NAME):
        for factor, parameter in adapter.named_factors():
            cuts = [] if factor.cut is None else [(factor.cut, tp_rank, tp_size)]
            key = f"{NAME}.{factor.name}"
            # the ranks that hold the same: data-parallel ones, and tensor-parallel ones of what is not cut
            holder = (0, tp_rank if factor.cut is None else 0, replica)
            state[key] = ShardedTensor.from_rank_offsets(key, parameter, *cuts, replica_id=holder)
    return state


@torch.no_grad()
def gather_adapters(
    target: TargetModel, layout: Layout, value: Callable[[torch.nn.Parameter], torch.Tensor] = plain
) -> dict[str, torch.Tensor]:
    """All factors by PEFT's names, whole, on rank 0's CPU; nothing on the others. Every rank calls it.

    `value` says what to take of each parameter, in its shape (main_grad for gradients).
    """
    group, held = ps.get_tensor_model_parallel_group(), {}
    for adapter in adapters_of(target):
        for factor, parameter in adapter.named_factors():
            part = value(parameter).contiguous()
            if factor.cut is not None and layout.tp_size > 1:
                parts = [torch.empty_like(part) for _ in range(layout.tp_size)]
                dist.all_gather(parts, part, group=group)
                part = torch.cat(parts, factor.cut)
            held[factor.name] = part.cpu()
    first = layout.dp_rank == layout.cp_rank == layout.tp_rank == 0
    stages: list[Any] = [None] * layout.world_size
    dist.gather_object(held if first else {}, stages if layout.is_main else None, dst=0)
    return {name: tensor for stage in stages if stage for name, tensor in stage.items()}
