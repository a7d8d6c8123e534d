"""What is checked before any rank starts, and before torch is imported where that can be: settings, model and data.

Rooms are imported inside the functions, after everything that can be checked without them.
"""

from pathlib import Path

from fuserl_megatron.config.facts import replica_ranks, row_settings
from fuserl_megatron.config.hub import local_model
from fuserl_megatron.config.schema import Config, UserError


def check(config: Config, num_ranks: int) -> list[str]:
    """All rules, the cheap ones first; returns what follows from the settings. Raises UserError."""
    from fuserl_megatron.config.validate import validate

    validate(config, num_ranks)
    model = local_model(config.model.path, weights=False)
    if not Path(model).is_dir():  # before torch is imported
        raise UserError(f"model.path={config.model.path}: no such directory; give a Hugging Face model directory.")
    from fuserl_megatron.convert.hf_config import read_config
    from fuserl_megatron.data.dataset import Manifest

    facts = validate(config, num_ranks, read_config(model), data_set=Manifest.read(config.data.path))
    if config.data.validation_path is not None:
        from fuserl_megatron.train.monitor import check_monitor

        check_monitor(config, Manifest.read(config.data.validation_path).sources)
    from fuserl_megatron.data.belonging import check_run

    return [*facts, *check_run(config)]


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
