"""Two passes without an optimizer: a model's figures on held-out prompts, and the scores a later run will look up."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from fuserl_megatron.config.objective import uses_reference, with_defaults
from fuserl_megatron.config.schema import Config, ObjectiveConfig
from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.convert.hf_io import check_model_directory
from fuserl_megatron.convert.names import hf_shapes
from fuserl_megatron.mcore import lora, parallel, weights
from fuserl_megatron.mcore.step import NonFiniteError
from fuserl_megatron.metrics.run_log import say
from fuserl_megatron.runtime.stopping import Stopped, Stopping
from fuserl_megatron.train.feed import FOLDERS, make_engine, make_feed, open_run, with_references
from fuserl_megatron.train.reference import reference_path
from fuserl_megatron.train.validation import validate
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import write_file

FILE = "evaluation.json"


def evaluate(config: Config, before: str | None = None) -> int:
    """Loss and metrics of model.path on data.path, printed and written to results_dir/evaluation.json.

    FuseSFT's loss with its defaults (the weighted NLL of each source's best response) always; with objective.stage
    fusepo the loss and metrics of that preference objective beside it. Every rank calls it.

    Args:
        config: the run.
        before: a model of the same shape, the one that training started from; its figures stand beside the others.

    Returns:
        0, or 1 where a loss is not finite.

    Raises:
        UserError: settings, models and data do not fit.
    """
    config, shape, (dataset,) = open_run(config, [config.data.path])
    if before is not None and hf_shapes(read_config(check_model_directory(before))) != hf_shapes(shape):
        raise UserError(f"--before {before}: is no model of the same shape as model.path={config.model.path}.")
    if uses_reference(config.objective):  # it stays the same for both: whatever is scored then, without an adapter
        mode = "cache" if config.objective.reference_mode == "adapter" else config.objective.reference_mode
        fixed = replace(config.objective, reference=reference_path(config), reference_mode=mode)
        config = replace(config, objective=fixed)
    directory, models = Path(config.run.results_dir), [config.model.path, *([before] if before is not None else [])]
    figures: dict[str, list[dict[str, float]]] = {}
    layout = parallel.initialize(config.model, config.trainer)
    try:
        sft = with_defaults(ObjectiveConfig())
        for objective in (sft, config.objective) if config.objective != sft else (sft,):
            one = replace(config, objective=objective)
            engine = make_engine(one, layout, shape, dataset.sources)
            (feed,) = with_references(one, engine, [make_feed(one, dataset, layout)])
            figures[objective.stage] = []
            for number, model in enumerate(models):
                weights.load_hf_weights(engine.target, model, layout)
                # an adapter is model.path's, not that of the model before
                with lora.off(engine.target) if number else nullcontext():
                    metrics = validate(one, engine, feed, 1, 1, lambda: None)
                figures[objective.stage].append({k.removeprefix("val_"): v for k, v in metrics.items()})
        if layout.is_main:
            _write(directory, config, before, figures)
        return 0
    except NonFiniteError as error:
        say(f"{config.model.path}: {error}", layout.is_main)
        return 1
    finally:
        parallel.shutdown()


def _write(directory: Path, config: Config, before: str | None, figures: dict[str, list[dict[str, float]]]) -> None:
    found: dict = {"model": config.model.path, "data": config.data.path}
    found |= {stage: _json(values[0]) for stage, values in figures.items()}
    if before is not None:
        found["before"] = {"model": before} | {stage: _json(values[1]) for stage, values in figures.items()}
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / FILE, [(json.dumps(found, indent=2) + "\n").encode()])
    say(f"{config.model.path} on {config.data.path}" + (f", before: {before}" if before is not None else ""))
    say("\n".join(table(figures)))
    say(f"written: {directory / FILE}")


def table(figures: dict[str, list[dict[str, float]]]) -> list[str]:
    """Lines of aligned columns with five digits: the metrics of each stage, after alone or before, after, difference.

    Args:
        figures: stage -> metrics of the model, and of the one before where it is compared.
    """
    rows = []
    for stage in (name for name in ("fusesft", "fusepo") if name in figures):
        after, *others = figures[stage]
        for name, value in after.items():
            numbers = [value] if not others else [others[0].get(name, math.nan), value]
            numbers += [numbers[1] - numbers[0]] if others else []
            rows.append([f"{stage} {name}", *(f"{number:.5g}" for number in numbers)])
    head = ["", "before", "after", "difference"] if rows and len(rows[0]) > 2 else ["", "value"]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (head, *rows)
    ]


def _json(metrics: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def score_reference(config: Config) -> int:
    """Fill the reference caches in results_dir that `train` under the same settings will look up. Every rank calls it.

    Returns:
        0, also when it was asked to stop: what is scored stays, and the marker says how to go on.

    Raises:
        UserError: as `train`.
    """
    config, shape, datasets = open_run(config, [config.data.path, config.data.validation_path])
    layout = parallel.initialize(config.model, config.trainer)
    stopping = Stopping(layout.device, config.exp_manager.max_time_per_run)
    try:
        feeds = [make_feed(config, data, layout, name) for data, name in zip(datasets, FOLDERS, strict=False)]
        with_references(config, make_engine(config, layout, shape, datasets[0].sources), feeds, stopping.check)
        return 0
    except Stopped:
        stopping.leave(Path(config.run.results_dir), "while scoring the reference", layout.is_main)
        return 0
    finally:
        parallel.shutdown()
