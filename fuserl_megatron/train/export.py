"""The end of a run: which weights become a Hugging Face directory, and what is written beside them."""

import dataclasses
import time
from pathlib import Path

from fuserl_megatron.checkpoint.torch_dist import iteration_directory
from fuserl_megatron.config.schema import Config
from fuserl_megatron.convert.chat_files import ChatFormat
from fuserl_megatron.convert.model_card import run_figures
from fuserl_megatron.convert.peft import write_adapter
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.mcore import checkpoint, lora, weights
from fuserl_megatron.mcore.model import gather_parameters
from fuserl_megatron.mcore.step import Engine
from fuserl_megatron.metrics.run_log import say
from fuserl_megatron.runtime import collectives
from fuserl_megatron.train.validation import History


def load_best(engine: Engine, checkpoints: Path, history: History, step: int) -> int:
    """The step to export: the best checkpoint, loaded, where a metric is monitored; the last step otherwise."""
    for best in collectives.from_main_rank(history.kept_steps(), engine.layout.device):
        if best == step:
            return step
        what, damage = f"best {history.monitor}: step {best}", checkpoint.damage_of(checkpoints, best, engine.layout)
        if damage is None:
            checkpoint.load(engine.target, iteration_directory(checkpoints, best), engine.optimizer)
            say(f"{what}, whose weights are exported", engine.layout.is_main)
            return best
        say(f"WARNING: {what}, whose checkpoint is damaged ({damage}): the next best", engine.layout.is_main)
    return step


def destination_of(config: Config) -> Path:
    """Where a run's export lies."""
    return Path(config.run.results_dir, "adapter" if config.adapter.export == "adapter" else "hf")


def export(config: Config, engine: Engine, dataset: FusedDataset, destination: Path, total: int) -> None:
    """Write the weights, or the adapter alone, to `destination`, with the template and end of turn of the data and the
    lineage for the model card. All ranks call it."""
    lineage = {
        "name": config.run.name,
        "stage": config.objective.stage,
        "target": config.model.path,
        "optimizer_steps": total,
        "figures": run_figures(Path(config.run.results_dir)) if engine.layout.is_main else {},
        "config": dataclasses.asdict(config),
    } | dataset.manifest.lineage()
    chat = ChatFormat(dataset.manifest.chat_template, dataset.manifest.end_of_turn_id)
    started = time.monotonic()
    tokenizer = config.model.tokenizer or config.model.path
    gather_parameters(engine.wrapped)
    layout, what = engine.layout, "Hugging Face model"
    if config.adapter.export == "adapter":
        what, tensors = "PEFT adapter", lora.gather_adapters(engine.target, layout)

        def write() -> None:
            adapter, shape = config.adapter, engine.target.shape
            write_adapter(destination, tensors, adapter, shape, source_dir=tokenizer, lineage=lineage, chat=chat)

        collectives.on_main_rank(layout, write)
    else:
        weights.export_hf(engine.target, layout, str(destination), source_dir=tokenizer, lineage=lineage, chat=chat)
    say(f"\n{what} written to {destination} in {time.monotonic() - started:.1f} s", layout.is_main)
