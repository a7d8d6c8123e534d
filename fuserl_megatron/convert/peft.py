"""LoRA adapters in PEFT's form: the factors of each layer by PEFT's names, and a directory of them read and written.

An adapter adds scale * B A x to what a linear layer W x gives: A [r, in], B [out, r]. Under tensor parallelism a factor
is cut where its matrix is: B along the outputs of q, k, v, gate and up, A along the inputs of o and down. The other
factor is small, and every rank holds it whole. Factors are never fused, so that each cut is a run of rows or columns.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuserl_megatron.config.adapter_section import AdapterConfig
from fuserl_megatron.convert.chat_files import ChatFormat, carry_chat
from fuserl_megatron.convert.families import FAMILIES
from fuserl_megatron.convert.hf_config import ModelShape
from fuserl_megatron.convert.hf_io import companion_files, copy_companions
from fuserl_megatron.convert.model_card import model_card
from fuserl_megatron.convert.names import LAYER, lengths
from fuserl_megatron.convert.weight_files import StoredTensor, read_header
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import read_json, write_json
from fuserl_megatron.util.paths import did_you_mean
from fuserl_megatron.util.tensor_io import read_into
from fuserl_megatron.util.text import show
from fuserl_megatron.util.whole_directory import whole_directory

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers."
# fmt: off
OTHER_KINDS = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "fan_in_fan_out",
               "trainable_token_indices", "lora_bias", "use_qalora", "target_parameters")
# fmt: on
"""Fields of PEFT's config which, where set, mean that something else is computed."""


@dataclass(frozen=True)
class Target:
    """A linear layer that may have an adapter."""

    linear: str
    """Core's layer that holds it, as an attribute of a transformer layer; q, k and v (gate and up) share one."""
    module: str
    """Its Hugging Face name inside a layer."""
    rule: str
    """Of the name table: qkv, gate_up or row."""
    sizes: tuple[str, str]
    """Outputs and inputs, in the letters of the name table."""


def _targets() -> Iterator[tuple[str, Target]]:
    for row in LAYER:
        if row.rule in ("qkv", "gate_up", "row") and row.megatron.endswith(".weight"):
            linear = row.megatron.removeprefix("decoder.layers.{i}.").removesuffix(".weight")
            for name, (outputs, inputs) in zip(row.hf, row.sizes, strict=True):
                module = name.removeprefix("model.layers.{i}.").removesuffix(".weight")
                yield module.rpartition(".")[2], Target(linear, module, row.rule, (outputs, inputs))


TARGETS = dict(_targets())
"""By the names of adapter.targets, in the order of a fused layer's outputs."""


@dataclass(frozen=True)
class Factor:
    """One matrix of an adapter."""

    name: str
    """PEFT's."""
    size: tuple[int, int]
    cut: int | None
    """The dimension that tensor parallelism cuts; None: every rank holds it whole."""

    def part(self, tp_size: int, tp_rank: int) -> tuple[slice, slice]:
        """What one tensor-parallel rank holds."""
        whole = [slice(0, size) for size in self.size]
        if self.cut is not None:
            step = self.size[self.cut] // tp_size
            whole[self.cut] = slice(tp_rank * step, (tp_rank + 1) * step)
        return whole[0], whole[1]


def factors(shape: ModelShape, rank: int, layer: int, target: str) -> tuple[Factor, Factor]:
    """A and B of one target in one layer (counted from 0)."""
    of, length = TARGETS[target], lengths(shape)
    outputs, inputs = (length[letter] for letter in of.sizes)
    along_inputs = of.rule == "row"
    name = f"{PREFIX}{layer}.{of.module}.lora_{{}}.weight"
    a = Factor(name.format("A"), (rank, inputs), 1 if along_inputs else None)
    return a, Factor(name.format("B"), (outputs, rank), None if along_inputs else 0)


def all_factors(shape: ModelShape, adapter: AdapterConfig) -> list[Factor]:
    """Those of the whole model."""
    targets = [name for name in TARGETS if name in adapter.targets]
    return [
        factor
        for layer in range(shape.num_layers)
        for target in targets
        for factor in factors(shape, adapter.rank, layer, target)
    ]


def num_parameters(shape: ModelShape, adapter: AdapterConfig) -> int:
    """Numbers that are trained; 0 where there is no adapter and all are."""
    if adapter.kind == "none":
        return 0
    return sum(math.prod(factor.size) for factor in all_factors(shape, adapter))


def layer_parameters(shape: ModelShape, adapter: AdapterConfig) -> tuple[int, int]:
    """Numbers of one layer's adapter: those that tensor parallelism cuts, and those that every rank holds."""
    of_layer = [factor for target in adapter.targets for factor in factors(shape, adapter.rank, 0, target)]
    cut = sum(math.prod(factor.size) for factor in of_layer if factor.cut is not None)
    return cut, sum(math.prod(factor.size) for factor in of_layer) - cut


def check_adapter(shape: ModelShape, adapter: AdapterConfig) -> None:
    """Whether this model can have the adapter, and adapter.path fits both.

    Raises:
        UserError: it cannot, or does not.
    """
    if adapter.kind == "none":
        return
    fused = [name for name in adapter.targets if TARGETS[name].linear + ".weight" in FAMILIES[shape.family].names]
    if fused:
        others = [name for name in adapter.targets if name not in fused]
        advice = f"; adapter.targets=[{','.join(others)}] would work" if others else ""
        raise UserError(
            f"adapter.targets: a {shape.family} model has no {fused[0]} of its own, it lies in one tensor with others, "
            f"and PEFT gives such a tensor one adapter{advice}."
        )
    if adapter.path is not None:
        AdapterReader(adapter.path, shape, adapter)


def write_adapter(
    destination: Path,
    tensors: Mapping[str, torch.Tensor],
    adapter: AdapterConfig,
    shape: ModelShape,
    *,
    source_dir: str | Path,
    lineage: dict[str, Any],
    chat: ChatFormat | None = None,
) -> None:
    """Write a PEFT adapter directory, whole or not at all.

    Args:
        destination: replaced where it is there.
        tensors: all factors, whole, by PEFT's names.
        adapter: their settings.
        shape: of the base.
        source_dir: holds the tokenizer that travels along.
        lineage: as of `model_card`; its target is the base.
        chat: the template and end of turn it was trained with; None leaves the source's.

    Raises:
        UserError: there is no tokenizer, or the place cannot be written.
    """
    from safetensors.torch import save_file

    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lineage["target"],
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "lora_dropout": 0.0,
        "use_rslora": adapter.use_rslora,
        "target_modules": list(adapter.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    files = companion_files(Path(source_dir), require_tokenizer=True)
    size = sum(tensor.nbytes for tensor in tensors.values()) + sum(file.stat().st_size for file, _ in files)
    with whole_directory(destination, needed_bytes=size, source_dir=lineage["target"], force=True) as partial:
        copy_companions(files, partial)
        carry_chat(partial, chat or ChatFormat(), shape.raw)
        write_json(partial / CONFIG, fields)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / WEIGHTS, {"format": "pt"})
        card = model_card(destination.name, lineage, partial, library="peft")
        (partial / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


class AdapterReader:
    """The factors in a PEFT adapter directory."""

    def __init__(self, directory: str, shape: ModelShape, adapter: AdapterConfig) -> None:
        """Compare the directory with the model and the settings.

        Raises:
            UserError: not such a directory, another kind of adapter, or other settings, with what to type.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            near = did_you_mean(self.directory) or "; give a PEFT adapter directory"
            raise UserError(f"adapter.path={directory}: no such directory{near}")
        found = read_json(self.directory / CONFIG, "a PEFT adapter's config", "adapter.path is a PEFT directory")
        _refuse_other_kinds(directory, found)
        self.tensors = read_header(self.directory / WEIGHTS)
        present = {name.split(".")[-3] for name in self.tensors if name.count(".") > 3}
        stored = {
            "rank": found.get("r"),
            "alpha": float(found["lora_alpha"]) if isinstance(found.get("lora_alpha"), int | float) else None,
            "use_rslora": bool(found.get("use_rslora", False)),
            "targets": sorted(present),
        }
        ours = {name: getattr(adapter, name) for name in stored} | {"targets": sorted(adapter.targets)}
        if stored != ours:
            words = " ".join(f"adapter.{name}={show(value)}" for name, value in stored.items() if value != ours[name])
            raise UserError(f"adapter.path={directory}: made with other settings; type {words}")
        expected = {factor.name: factor.size for factor in all_factors(shape, adapter)}
        for name, size in expected.items():
            if name not in self.tensors or self.tensors[name].shape != size:
                is_there = list(self.tensors[name].shape) if name in self.tensors else "not there"
                raise UserError(
                    f"{self.directory / WEIGHTS}: {name} is {is_there}, the model calls for {list(size)}; "
                    "it is an adapter of another model"
                )
        for name in self.tensors.keys() - expected.keys():
            raise UserError(f"{self.directory / WEIGHTS}: holds {name}, which is none of adapter.targets")

    def read(self, factor: Factor) -> torch.Tensor:
        """A whole factor."""
        stored: StoredTensor = self.tensors[factor.name]
        out = torch.empty(stored.shape, dtype=stored.dtype)
        with open(stored.file, "rb", buffering=0) as file:
            if not read_into(file, stored.start, out):
                raise UserError(f"{stored.file}: ends inside {factor.name}; copy it again")
        return out


def _refuse_other_kinds(directory: str, found: dict[str, Any]) -> None:
    """What would be computed otherwise than here."""
    where = f"adapter.path={directory}: {CONFIG} has"
    if found.get("peft_type") != "LORA":
        raise UserError(f"{where} peft_type={found.get('peft_type')}; only LORA is trained here")
    if found.get("bias", "none") != "none":
        raise UserError(f"{where} bias={found['bias']}; only bias=none is trained here")
    for field in OTHER_KINDS:
        if found.get(field):
            raise UserError(f"{where} {field}={json.dumps(found[field])}; such an adapter is not trained here")
