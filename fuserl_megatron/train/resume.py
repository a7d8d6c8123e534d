"""Is this the same run? What must agree between a run and its continuation, checked before anything is written.

The number of steps may change: a run is made longer by the same command with more epochs or steps.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from fuserl_megatron.checkpoint.torch_dist import candidates, iteration_directory
from fuserl_megatron.config.keys import leaves
from fuserl_megatron.config.schema import AdapterConfig, Config
from fuserl_megatron.convert import peft
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.mcore import checkpoint, parallel
from fuserl_megatron.metrics.run_log import say
from fuserl_megatron.runtime import collectives
from fuserl_megatron.util.errors import UserError

PROBE_BYTES = 1 << 20
NO_ADAPTER = {"kind": "none"}
STEPS = "steps in all"
"""In a checkpoint's progress: how many steps the run was to have."""


def run_identity(config: Config, dataset: FusedDataset, reward_temperature: float, total: int) -> dict:
    """Everything that the numbers of a run depend on. The layout over the ranks, packing and logging are not in it."""
    objective = dataclasses.asdict(config.objective)
    objective.pop("reference_mode")
    if not objective["loss_kwargs"]:  # runs from before there were any
        del objective["loss_kwargs"]
    identity = {
        "adapter": _adapter_identity(config.adapter),
        "model.path": fingerprint(config.model.path),
        "objective": objective | {"reference": config.objective.reference and fingerprint(config.objective.reference)},
        "data set": dataset.hash,
        "reward_temperature": str(reward_temperature),  # JSON has no infinity
        "run.seed": config.run.seed,
        "data.shuffle": config.data.shuffle,
        "data.global_batch_size": config.data.global_batch_size,
        STEPS: total,
        "trainer.precision": config.trainer.precision,
        "trainer.gradient_clip_val": config.trainer.gradient_clip_val,
        "optim": {k: v for k, v in dataclasses.asdict(config.optim).items() if not k.startswith("overlap_")},
    }
    return json.loads(json.dumps(identity))  # tuples become lists, as in the file it is compared with


def _adapter_identity(adapter: AdapterConfig) -> dict:
    if adapter.kind == "none":
        return NO_ADAPTER
    path = adapter.path and fingerprint(adapter.path, peft.CONFIG)
    return {k: v for k, v in dataclasses.asdict(adapter).items() if k != "export"} | {"path": path}


def fingerprint(path: str, config: str = "config.json") -> str:
    """A hash of a model directory, cheap for 140 GB: its config, and size, start and end of every file."""
    digest = hashlib.sha256((Path(path) / config).read_bytes())
    for file in sorted(Path(path).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(PROBE_BYTES))
            opened.seek(max(0, size - PROBE_BYTES), os.SEEK_SET)
            digest.update(opened.read())
    return digest.hexdigest()[:16]


def steps_to_resume(
    config: Config, checkpoints: Path, identity: dict, layout: parallel.Layout
) -> tuple[int, list[int], dict]:
    """Where to go on: the newest checkpoint that verifies. Every rank calls it.

    Returns:
        The iteration (0 for a fresh start), those found damaged before it, and what was saved along with it.

    Raises:
        UserError: on every rank; no checkpoint is whole, they belong to another run, or must not be resumed.
    """
    order, pointer_problem = collectives.from_main_rank(candidates(checkpoints), layout.device)
    if not order and not config.exp_manager.resume_ignore_no_checkpoint:
        raise UserError(
            f"{checkpoints} holds no checkpoint and exp_manager.resume_ignore_no_checkpoint=false: "
            "set it to true to start from model.path, or name the run.results_dir of the run to continue."
        )
    if order and not config.exp_manager.resume_if_exists:
        raise UserError(
            f"{checkpoints} holds a checkpoint of step {order[0]} and exp_manager.resume_if_exists=false: "
            "set it to true to continue, or choose another run.results_dir."
        )
    found, damaged = 0, {}
    for iteration in order:
        damage = checkpoint.damage_of(checkpoints, iteration, layout)
        if damage is None:
            found = iteration
            break
        damaged[iteration] = f"{iteration_directory(checkpoints, iteration).name}: {damage}"
    problems = [*filter(None, [pointer_problem]), *damaged.values()]
    if not found and problems:
        raise UserError(
            f"{checkpoints} holds no whole checkpoint ({'; '.join(problems)}): put one back from a copy, "
            f"or, to start anew, choose another run.results_dir or remove {checkpoints}."
        )
    if layout.is_main:
        for problem in problems:
            say(f"WARNING: damaged checkpoint in {checkpoints}: {problem}. Step {found} is used instead")
    saved = collectives.on_main_rank(layout, _progress_of_this_run, checkpoints, found, identity) if found else {}
    before, now = saved.get(STEPS), identity.get(STEPS)
    if None not in (before, now) and before != now:
        what = f"this run was to have {before} steps and has {now} now: from step {found + 1} on the learning rate is"
        say(f"NOTE: {what} that of {now} steps", layout.is_main)
    return found, list(damaged), saved


def _progress_of_this_run(checkpoints: Path, iteration: int, identity: dict) -> dict:
    progress = checkpoint.read_progress(checkpoints, iteration)
    saved = dict(leaves({"adapter": NO_ADAPTER} | progress))  # runs from before there were adapters
    for key, now in leaves(identity):
        if key == "model.path" and saved.get(key) != now:
            raise UserError(
                f"{checkpoints} belongs to a run on other weights than those in model.path now ({saved.get(key)}, not "
                f"{now}): put them back to continue, or choose another run.results_dir to start anew."
            )
        if key != STEPS and saved.get(key) != now:
            raise UserError(
                f"{checkpoints} belongs to a run with {key}={saved.get(key)}, this one has {key}={now}: "
                "use the same value to continue, or another run.results_dir to start anew."
            )
    if identity.get(STEPS, iteration) < iteration:
        raise UserError(
            f"{checkpoints} holds step {iteration}, and the run is to have {identity[STEPS]} steps: set "
            f"trainer.max_steps to {iteration} or more (or more trainer.max_epochs), or choose another run.results_dir."
        )
    return progress
