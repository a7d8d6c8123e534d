"""Two passes without an optimizer: a model's figures on held-out prompts, and the scores a later run will look up."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fuserl_megatron.config.objective import with_defaults
from fuserl_megatron.config.schema import Config, ObjectiveConfig
from fuserl_megatron.convert.hf_config import ModelShape, read_config
from fuserl_megatron.convert.hf_io import check_model_directory
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.mcore import parallel, weights
from fuserl_megatron.mcore.model import build_model
from fuserl_megatron.mcore.precision import parameter_dtype
from fuserl_megatron.mcore.step import Engine, NonFiniteError
from fuserl_megatron.train.feed import Feed, make_feed, with_references
from fuserl_megatron.train.logging import say
from fuserl_megatron.train.loop import open_dataset, with_loss_defaults
from fuserl_megatron.train.stopping import Stopped, Stopping
from fuserl_megatron.train.validation import validate

FILE = "evaluation.json"


def evaluate(config: Config) -> int:
    """Loss and metrics of model.path on data.path, printed and written to results_dir/evaluation.json.

    FuseSFT's loss with its defaults (the weighted NLL of each source's best response) always; with objective.stage
    fusepo the loss and metrics of that preference objective beside it. Every rank calls it.

    Returns:
        0, or 1 where a loss is not finite.

    Raises:
        UserError: settings, model and data do not fit.
    """
    config, shape, (dataset, *_) = _opened(config, [config.data.path])
    directory, found = Path(config.run.results_dir), {"model": config.model.path, "data": config.data.path}
    layout = parallel.initialize(config.model, config.trainer)
    try:
        for objective in dict.fromkeys((with_defaults(ObjectiveConfig()), config.objective)):
            one = replace(config, objective=objective)
            engine, (feed,) = _with_references(one, layout, shape, [(dataset, directory / "reference")])
            weights.load_hf_weights(engine.target, config.model.path, layout)
            metrics = validate(one, engine, feed, 1, 1, lambda: None)
            found[objective.stage] = {
                k.removeprefix("val_"): v if math.isfinite(v) else None for k, v in metrics.items()
            }
        if layout.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            partial = directory / f".{FILE}.partial"
            partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            partial.replace(directory / FILE)
            say(f"{config.model.path} on {config.data.path}")
            for stage in [name for name in ("fusesft", "fusepo") if name in found]:
                say("\n".join(f"{stage} {name:<32}{value}" for name, value in found[stage].items()))
            say(f"written: {directory / FILE}")
        return 0
    except NonFiniteError as error:
        if layout.is_main:
            say(f"{config.model.path}: {error}")
        return 1
    finally:
        parallel.shutdown()


def score_reference(config: Config) -> int:
    """Fill the reference caches in results_dir that `train` under the same settings will look up. Every rank calls it.

    Returns:
        0, also when it was asked to stop: what is scored stays, and the marker says how to go on.

    Raises:
        UserError: as `train`.
    """
    paths = [path for path in (config.data.path, config.data.validation_path) if path is not None]
    config, shape, datasets = _opened(config, paths)
    directory = Path(config.run.results_dir)
    layout = parallel.initialize(config.model, config.trainer)
    stopping = Stopping(layout.device, config.exp_manager.max_time_per_run)
    names = ("reference", "reference_validation")
    jobs = [(dataset, directory / name) for dataset, name in zip(datasets, names)]  # noqa: B905
    try:
        _with_references(config, layout, shape, jobs, stopping.check)
        return 0
    except Stopped:
        stopping.leave(directory, "while scoring the reference", layout.is_main)
        return 0
    finally:
        parallel.shutdown()


def _opened(config: Config, paths: Sequence[str]) -> tuple[Config, ModelShape, list[FusedDataset]]:
    config = with_loss_defaults(config)
    for path in filter(None, (config.model.path, config.objective.reference)):
        check_model_directory(path)
    shape = read_config(config.model.path)
    return config, shape, [open_dataset(config, path, shape) for path in paths]


def _with_references(
    config: Config,
    layout: parallel.Layout,
    shape: ModelShape,
    jobs: Sequence[tuple[FusedDataset, Path]],
    between_batches: Callable[[], None] = lambda: None,
) -> tuple[Engine, list[Feed]]:
    """An engine whose weights are yet to be loaded, and a feed for each data set, with the reference's scores."""
    multiple = layout.pp_size if layout.vpp_size else 1
    feeds = [(make_feed(config, dataset, layout.dp_size, multiple), directory) for dataset, directory in jobs]
    engine = Engine(
        target=build_model(
            shape,
            config.model,
            layout,
            parameter_dtype(config.trainer.precision),
            config.trainer.precision,
        ),
        layout=layout,
        objective=config.objective,
        source_names=jobs[0][0].sources,
        logprob_chunk_size=config.model.logprob_chunk_size,
    )
    return engine, with_references(config, engine, feeds, between_batches)
