"""Two passes without an optimizer: a model's figures on held-out prompts, and the scores a later run will look up."""

import json
import math
from dataclasses import replace
from pathlib import Path

from fuserl_megatron.config.objective import with_defaults
from fuserl_megatron.config.schema import Config, ObjectiveConfig
from fuserl_megatron.data.files import write_file
from fuserl_megatron.mcore import parallel, weights
from fuserl_megatron.mcore.step import NonFiniteError
from fuserl_megatron.train.feed import FOLDERS, make_engine, make_feed, open_run, with_references
from fuserl_megatron.train.logging import say
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
    config, shape, (dataset,) = open_run(config, [config.data.path])
    directory, found = Path(config.run.results_dir), {"model": config.model.path, "data": config.data.path}
    layout = parallel.initialize(config.model, config.trainer)
    try:
        for objective in dict.fromkeys((with_defaults(ObjectiveConfig()), config.objective)):
            one = replace(config, objective=objective)
            engine = make_engine(one, layout, shape, dataset.sources)
            (feed,) = with_references(one, engine, [make_feed(one, dataset, layout)])
            weights.load_hf_weights(engine.target, config.model.path, layout)
            metrics = validate(one, engine, feed, 1, 1, lambda: None)
            found[objective.stage] = {
                k.removeprefix("val_"): v if math.isfinite(v) else None for k, v in metrics.items()
            }
        if layout.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            write_file(directory / FILE, [(json.dumps(found, indent=2) + "\n").encode()])
            say(f"{config.model.path} on {config.data.path}")
            for stage in [name for name in ("fusesft", "fusepo") if name in found]:
                say("\n".join(f"{stage} {name:<32}{value}" for name, value in found[stage].items()))
            say(f"written: {directory / FILE}")
        return 0
    except NonFiniteError as error:
        say(f"{config.model.path}: {error}", layout.is_main)
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
