"""What is checked before any rank starts, and before torch is imported where that can be: settings, model and data.

Rooms are imported inside the functions, after everything that can be checked without them.
"""

import contextlib
import dataclasses
from pathlib import Path

from fuserl_megatron.config.derived import replica_ranks, row_settings
from fuserl_megatron.config.schema import Config
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.hub import local_model
from fuserl_megatron.util.locks import only_writer
from fuserl_megatron.util.paths import did_you_mean


def lock_of(config: Config) -> contextlib.AbstractContextManager:
    """The lock of run.results_dir: two runs there would take each other's checkpoints for left-overs."""
    directory = config.run.results_dir
    return only_writer(Path(directory, ".lock"), directory, "choose another run.results_dir")


def check(config: Config, num_ranks: int) -> tuple[list[str], list[str]]:
    """All rules, the cheap ones first. Raises UserError.

    Returns:
        What follows from the settings, and in which way data and model differ that is no mistake; lines to print.
    """
    from fuserl_megatron.config.validate import validate

    validate(config, num_ranks)
    model = local_model(config.model.path, weights=False)
    if not Path(model).is_dir():  # before torch is imported
        near = did_you_mean(model) or "; give a Hugging Face model directory."
        raise UserError(f"model.path={config.model.path}: no such directory{near}")
    from fuserl_megatron.convert.hf_config import read_config
    from fuserl_megatron.data.dataset import Manifest

    held_out = Manifest.read(config.data.validation_path) if config.data.validation_path is not None else None
    shape = read_config(model)
    facts = validate(config, num_ranks, shape, Manifest.read(config.data.path), held_out)
    if config.adapter.kind == "lora":
        from fuserl_megatron.convert.peft import check_adapter

        check_adapter(shape, config.adapter)
    if held_out is not None:
        from fuserl_megatron.train.monitor import check_monitor

        check_monitor(config, held_out.sources)
    from fuserl_megatron.records.belonging import check_run

    return facts, check_run(config)


def with_local_models(config: Config) -> Config:
    """The configuration of a run with every hub name replaced by its directory, weights fetched."""
    model, objective = config.model, config.objective
    tokenizer = model.tokenizer and local_model(model.tokenizer, weights=False)
    reference = objective.reference and local_model(objective.reference)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, path=local_model(model.path), tokenizer=tokenizer),
        objective=dataclasses.replace(objective, reference=reference),
    )


def check_reference(config: Config) -> None:
    """Whether the objective stores scores of its reference, as --reference-only wants. Raises UserError."""
    from fuserl_megatron.config.objective import reference_mode, uses_reference

    mode = reference_mode(config)
    if not (reads := uses_reference(config.objective)) or mode != "cache":
        what = f"objective.reference_mode={mode} stores" if reads else "this objective reads"
        raise UserError(f"--reference-only: {what} no reference scores; objective=fusepo_ln_dpo would.")


def check_weight_files(config: Config) -> None:
    """Whether the models' weight files hold what their config.json says; of a hub name they may not be here yet."""
    from fuserl_megatron.convert.hf_io import check_weights

    for path in filter(None, (config.model.path, config.objective.reference)):
        if any(Path(path).glob("*.safetensors")):
            check_weights(path)


def laid_out(config: Config, num_ranks: int) -> list[str]:
    """What each data set gives under these settings, a line each. Raises UserError where something does not fit."""
    from fuserl_megatron.data.dataset import FusedDataset
    from fuserl_megatron.data.pairs import prepare
    from fuserl_megatron.data.sampler import GlobalBatchSampler
    from fuserl_megatron.data.too_long import fitted

    lines, dp_size = [], num_ranks // replica_ranks(config.model)
    rows = row_settings(config)
    for path in filter(None, (config.data.path, config.data.validation_path)):
        chosen = prepare(FusedDataset(path, verify=False), config.objective, config.data.reward_temperature)
        prepared = fitted(chosen, rows)
        sampler = GlobalBatchSampler(prepared, rows, config.run.seed, dp_size)
        lines.append(
            f"{path}: {prepared.num_prompts} prompts in {sampler.steps_per_epoch} steps an epoch, "
            f"{prepared.response_ids.size} sequences, {prepared.chosen.size} pairs"
            + (f" ({chosen.num_prompts - prepared.num_prompts} prompts too long)" if prepared.fitted else "")
        )
    return lines
