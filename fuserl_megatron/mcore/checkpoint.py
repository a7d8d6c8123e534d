"""Layout-independent checkpoints: what belongs into one (core says), and filling a model from one of any layout.

Writing is in saving.py, the files' format and their checksums in the room checkpoint.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from fuserl_megatron.checkpoint.manifest import PROGRESS, find_damage
from fuserl_megatron.checkpoint.torch_dist import iteration_directory
from fuserl_megatron.mcore import lora
from fuserl_megatron.mcore.loading import load_state
from fuserl_megatron.mcore.model import TargetModel, gather_parameters
from fuserl_megatron.mcore.parallel import Layout
from fuserl_megatron.mcore.saving import Saving, first_line
from fuserl_megatron.mcore.step import Engine
from fuserl_megatron.runtime.collectives import from_all_ranks
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import BadFile, read_json

ADVICE = ": remove that folder to use the checkpoint before it, or start in another run.results_dir."


def _metadata() -> dict:
    return {
        "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }


def _state(target: TargetModel, optimizer: ChainedOptimizer | None, *, is_loading: bool) -> dict:
    metadata = _metadata()
    # with virtual stages layers carry their global index, so that all chunks make one model
    if lora.adapters_of(target):  # the model's own weights are those of model.path
        state = {name: lora.sharded_state(chunk) for name, chunk in _named(target.chunks)}
    else:
        state = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _named(target.chunks)}
    if optimizer is not None:
        if is_loading:
            _materialize_optimizer_state(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state


def _named(chunks: list[GPTModel]) -> list[tuple[str, GPTModel]]:
    """With the names that Megatron gives them in a state."""
    return [(f"model{i}" if len(chunks) > 1 else "model", chunk) for i, chunk in enumerate(chunks)]


def begin_save(engine: Engine, root: str | Path, iteration: int, progress: dict, background: bool = False) -> Saving:
    """Take weights and optimizer state of this step and start writing them; `Saving.publish` ends it. Every rank calls
    it; arguments as of `Saving`."""
    gather_parameters(engine.wrapped)
    state = _state(engine.target, engine.optimizer, is_loading=False)
    return Saving(engine.layout, state, root, iteration, progress, background)


def damage_of(root: str | Path, iteration: int, layout: Layout) -> str | None:
    """What is wrong with a checkpoint, None where it is whole: every rank verifies a share of it, all learn."""
    mine = find_damage(iteration_directory(root, iteration), iteration, layout.rank, layout.world_size)
    return next(filter(None, from_all_ranks(mine)), None)


def read_progress(root: str | Path, iteration: int) -> dict:
    """What `save` was given as progress; read without loading the checkpoint.

    Raises:
        UserError: it is not there or not readable.
    """
    file = iteration_directory(root, iteration) / PROGRESS
    advice = "remove that checkpoint to use the one before it"
    progress = read_json(file, "a run's progress", advice)
    validations = progress.get("validations", [])
    if not isinstance(validations, list) or not all(map(_is_validation, validations)):
        raise BadFile(file, "not a run's progress (validations)", advice)
    return progress


def _is_validation(record: Any) -> bool:
    """A step, and metrics that are numbers, or null where they were not finite."""
    numbers = isinstance(record, dict) and isinstance(record.get("step"), int)
    return numbers and all(value is None or isinstance(value, int | float) for value in record.values())


def load(target: TargetModel, folder: Path, optimizer: ChainedOptimizer | None = None, advice: str = ADVICE) -> None:
    """Fill a model, and its optimizer where one is given, from an iteration's folder of a checkpoint of any layout.

    Raises:
        UserError: on every rank: the checkpoint does not fit the model, cannot be read, or names anything foreign.
    """
    state: dict[str, Any] = {}
    problem: str | None = None
    try:
        state = load_state(_state(target, optimizer, is_loading=True), folder, advice)
    except UserError as error:
        problem = str(error)
    except MemoryError:  # no fault of the files
        raise
    except Exception as error:  # a checkpoint of another kind surfaces as many kinds of errors
        problem = f"{folder}: cannot be loaded ({first_line(error)}){advice}"
    problem = next(filter(None, from_all_ranks(problem)), None)  # the others would wait for this rank
    if problem:
        raise UserError(problem)
    for name, chunk in _named(target.chunks):
        with _extra_state_is_vetted():
            # strict but for an adapter's checkpoint, whose tensors have filled the adapters already
            if not lora.adapters_of(target):
                chunk.load_state_dict(state[name])
    if optimizer is not None:
        _load_optimizer(optimizer, state["optimizer"])


@contextmanager
def _extra_state_is_vetted() -> Iterator[None]:
    """Around the loading of what `load_state` gave: Transformer Engine (2.17) unpickles a delayed recipe's state only
    where the environment allows it. Whatever that pickle names was checked against a short list (safe_load.read_state).
    """
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# Core's distributed optimizer with torch's AdamW (no Transformer Engine, no Apex) needs three things around a load, on
# GPUs too: upstream gaps. tests/distributed compare a resumed run bit for bit.
def _materialize_optimizer_state(optimizer) -> None:
    """An optimizer that never stepped has no state to describe: give it zeros first."""
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()


@torch.no_grad()
def _load_optimizer(optimizer, state: dict) -> None:
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            _accept_step(part)
    optimizer.load_state_dict(state)
    for part in optimizer.chained_optimizers:
        for values in part.optimizer.state.values():
            if isinstance(values.get("step"), torch.Tensor):
                values["step"] = values["step"].clone()  # one shared tensor would count once for every parameter


def _accept_step(part: DistributedOptimizer) -> None:
    """Loading writes exp_avg and the like, but stumbles over `step`: hand it the value that is already in place."""
    original = type(part)._set_main_param_and_optimizer_states

    def with_step(model_param, tensors):
        group, index = part.model_param_group_index_map[model_param]
        own = part.optimizer.state[part.optimizer.param_groups[group]["params"][index]]
        if isinstance(own.get("step"), torch.Tensor):
            tensors = {**tensors, "step": own["step"]}
        with torch.no_grad():
            return original(part, model_param, tensors)

    part._set_main_param_and_optimizer_states = with_step
