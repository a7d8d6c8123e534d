"""Layout-independent checkpoints through core's dist_checkpointing: saved at one TP/PP/DP, loadable at any other.

    checkpoints/iter_0000010/                     core's torch_dist format, stock GPTModel key names
    checkpoints/latest_checkpointed_iteration.txt the pointer, written last, by rename, after everything is on the disk

A checkpoint under way lives in a hidden sibling directory and gets its name only when complete, so what has a name
is whole.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from fuserl_megatron.config.schema import UserError
from fuserl_megatron.mcore.dist_format import POINTER, iteration_directory, saved_iterations
from fuserl_megatron.mcore.dist_format import newest_iteration as newest_iteration
from fuserl_megatron.mcore.model import gather_parameters
from fuserl_megatron.mcore.parallel import any_rank
from fuserl_megatron.mcore.step import Engine

PROGRESS = "progress.json"
FAILURES = (Exception, CheckpointException)  # torch's CheckpointException is no Exception


def _metadata() -> dict:
    return {
        "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }


def _state(engine: Engine, *, is_loading: bool) -> dict:
    metadata = _metadata()
    # with virtual stages layers carry their global index, so that all chunks make one model
    models = {f"model{i}": c.sharded_state_dict(metadata=metadata) for i, c in enumerate(engine.target.chunks)}
    state = dict(models) if len(models) > 1 else {"model": models["model0"]}
    if engine.optimizer is not None:
        if is_loading:
            _materialize_optimizer_state(engine.optimizer)
        state["optimizer"] = engine.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state


def save(engine: Engine, root: str | Path, iteration: int, progress: dict, keep: int, kept: Sequence[int] = ()) -> Path:
    """Write one checkpoint, move the pointer, remove old ones. All ranks call it; all or none return.

    Args:
        engine: model and optimizer.
        root: the run's checkpoints folder.
        iteration: steps done.
        progress: JSON-able values that travel along, for `read_progress`.
        keep: how many of the newest to keep; -1 keeps all.
        kept: iterations that are never removed (the best ones).

    Raises:
        OSError: the disk refused (full, read-only); nothing half-written is left and older checkpoints are untouched.
    """
    root, final = Path(root), iteration_directory(root, iteration)
    partial = root / f".{final.name}.partial"
    problem = None
    if engine.layout.is_main:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            problem = error
    if any_rank(problem is not None, engine.layout.device):
        raise problem or OSError(f"{root}: the main rank could not create {partial.name}")
    gather_parameters(engine.wrapped)
    state = _state(engine, is_loading=False) | {"iteration": iteration}
    try:
        dist_checkpointing.save(state, str(partial))
    except FAILURES as error:  # core wraps a full disk in exceptions of its own
        problem = error
    if any_rank(problem is not None, engine.layout.device):
        if engine.layout.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        why = _first_line(problem) if problem else "another rank failed"
        raise OSError(
            f"{final}: the checkpoint could not be written ({why}); is the disk full? The last good one is untouched"
        ) from problem
    if engine.layout.is_main:
        try:
            _publish(root, partial, final, iteration, progress, keep, kept)
        except OSError as error:
            problem = error
    if any_rank(problem is not None, engine.layout.device):
        raise problem or OSError(f"{final}: the main rank could not publish the checkpoint")
    return final


def _publish(
    root: Path, partial: Path, final: Path, iteration: int, progress: dict, keep: int, kept: Sequence[int]
) -> None:
    (partial / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
    for file in [*partial.iterdir(), partial]:
        _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    pointer = root / f".{POINTER}.tmp"
    pointer.write_text(f"{iteration}\n")
    _sync(pointer)
    pointer.rename(root / POINTER)
    _sync(root)
    # by age of the run, not by number alone: after going back to an older step, later ones do not count
    past = [i for i in saved_iterations(root) if i <= iteration]
    for old in past[:-keep] if keep > 0 else []:
        if old not in kept:
            shutil.rmtree(iteration_directory(root, old), ignore_errors=True)


def _first_line(error: BaseException) -> str:
    failures = getattr(error, "failures", None)  # a CheckpointException names the ranks; the cause is in here
    if failures:
        error = next(iter(failures.values()))[0]
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_progress(root: str | Path, iteration: int) -> dict:
    """What `save` was given as progress; read without loading the checkpoint.

    Raises:
        UserError: it is not there or not readable.
    """
    file = iteration_directory(root, iteration) / PROGRESS
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: not readable ({_first_line(error)}): write an older iteration into {POINTER} beside it, "
            "or start in another run.results_dir."
        ) from None


def load(engine: Engine, root: str | Path, iteration: int) -> None:
    """Fill model and optimizer from a checkpoint of any layout.

    Raises:
        UserError: the checkpoint does not fit the model or cannot be read.
    """
    directory = iteration_directory(root, iteration)
    try:
        state = dist_checkpointing.load(_state(engine, is_loading=True) | {"iteration": 0}, str(directory))
    except FAILURES as error:  # damaged files surface as many kinds of errors
        raise UserError(
            f"{directory}: cannot be loaded ({_first_line(error)}): "
            f"write an older iteration into {POINTER} there, or start in another run.results_dir."
        ) from error
    chunks = engine.target.chunks
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state["model" if len(chunks) == 1 else f"model{i}"])
    if engine.optimizer is not None:
        _load_optimizer(engine.optimizer, state["optimizer"])


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
