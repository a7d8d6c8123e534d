"""What the CPU benchmarks share: a tiny Llama, groups to train on, and this trainer's step, ready to be called.

Shapes: none; sizes are tokens.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path

from fuserl_megatron.config.schema import (
    BuildConfig,
    Config,
    DataConfig,
    ExpManagerConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PackingConfig,
    RunConfig,
    TrainerConfig,
)

SKILLS = Path(__file__).resolve().parents[1] / "examples" / "skills"
DPO = dict(stage="fusepo", loss="dpo", beta=0.1)
SFT = dict(stage="fusesft")


def machine() -> dict:
    """Where and when figures were taken."""
    import torch

    return dict(
        date=time.strftime("%Y-%m-%d"),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """--threads, --json, --plot."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default=None, help="write the figures to this file")
    parser.add_argument("--plot", default=None, help="write a plot to this file")


def write_up(options: argparse.Namespace, rows: list[dict], plot: Callable[[list[dict], str], None]) -> None:
    """The figures and their plot into the files that were asked for."""
    if options.json:
        Path(options.json).write_text(json.dumps(machine() | dict(threads=options.threads, rows=rows), indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot)


def save_model(directory: Path, **shape: int) -> None:
    """A random Llama with the tokenizer and chat template of examples/skills (one token a character).

    Args:
        directory: where to write.
        **shape: fields of the config that differ from the demo's target.
    """
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = json.loads((SKILLS / "target" / "config.json").read_text()) | {"dtype": "float32"} | shape
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SKILLS / "target" / name, directory)


def write_records(
    path: Path,
    num_prompts: int,
    num_sources: int,
    prompt: int,
    response: int,
    *,
    responses: int = 2,
    jitter: float = 0.2,
) -> None:
    """Random groups.

    Args:
        path: the JSONL file.
        num_prompts: groups.
        num_sources: K.
        prompt: tokens of a prompt, chat template included.
        response: tokens of a response, end of turn included.
        responses: of each source; the earlier one has the higher reward.
        jitter: lengths lie within this share of those asked for.
    """
    rng = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(rng.choice("abcdefgh") for _ in range(round(tokens * rng.uniform(1 - jitter, 1 + jitter))))

    with open(path, "w") as file:
        for p in range(num_prompts):
            question = f"{p:04d}" + text(prompt - 7)
            for k in range(num_sources):
                for n in range(responses):
                    reward = rng.uniform(0.0, 0.5) + 0.5 * (n == 0)
                    record = dict(prompt=question, source=f"s{k}", response=text(response - 1), reward=reward)
                    file.write(json.dumps(record) + "\n")


def build_data(inputs: list[Path], tokenizer: Path, output: Path, max_length: int) -> None:
    """`fuserl build`."""
    from fuserl_megatron.records.build import build

    build(
        BuildConfig(
            inputs=tuple(str(path) for path in inputs),
            output=str(output),
            tokenizer=str(tokenizer),
            reward_temperature=0.1,
            max_length=max_length,
        ),
        progress=False,
    )


def prepare_case(root: Path, case: str) -> None:
    """Model and data set: `demo` as examples/skills has it, else 3 million weights, prompt : response 4 : 1."""
    if case == "demo":
        save_model(root / "model")
        build_data([SKILLS / "data" / "train_po.00.jsonl"], root / "model", root / "data", 64)
    else:
        save_model(root / "model", max_position_embeddings=512, hidden_size=256, intermediate_size=768, head_dim=64)
        write_records(root / "records.jsonl", 48, 4, 160, 40)
        build_data([root / "records.jsonl"], root / "model", root / "data", 512)


def run_config(
    root: Path, objective: dict, *, seq_length: int, rows: int, prompts: int, share: str = "auto", name: str = "run"
) -> Config:
    """One CPU process, fp32, on `root`/model and `root`/data, writing to `root`/name."""
    return Config(
        run=RunConfig(results_dir=str(root / name), name="benchmark"),
        trainer=TrainerConfig(accelerator="cpu", precision="32", max_epochs=1000, log_every_n_steps=10**9),
        exp_manager=ExpManagerConfig(),
        model=ModelConfig(path=str(root / "model"), make_vocab_size_divisible_by=4),
        data=DataConfig(
            path=str(root / "data"),
            seq_length=seq_length,
            micro_batch_size=rows,
            global_batch_size=prompts,
            packing=PackingConfig(share_prefix=share),
        ),
        objective=ObjectiveConfig(**objective),
        optim=OptimConfig(lr=1e-6, weight_decay=0.01),
    )


class NoReference:
    """Log-probabilities of 0, where only the speed counts."""

    def scores(self, batches):
        """Itself: it looks up."""
        return self

    def lookup(self, ids):
        """0 for every response."""
        return ids.float() * 0


class Trainer:
    """This trainer's own loop body on one process: data, model, stored reference and log as `fuserl train` has them."""

    def __init__(self, config: Config, random_weights: bool = False):
        """Start the process groups, build model and optimizer, score the reference.

        Args:
            config: the run.
            random_weights: load nothing (model.path needs a config.json only); reference log-probabilities are 0.
        """
        from fuserl_megatron.config.objective import with_loss_defaults
        from fuserl_megatron.convert.hf_config import read_config
        from fuserl_megatron.data.dataset import FusedDataset
        from fuserl_megatron.mcore import parallel, weights
        from fuserl_megatron.metrics.run_log import RunLog
        from fuserl_megatron.runtime.stopping import Stopping
        from fuserl_megatron.train.feed import make_engine, make_feed, with_optimizer, with_references

        self.config = config = with_loss_defaults(config)
        shape, dataset = read_config(config.model.path), FusedDataset(config.data.path)
        directory = Path(config.run.results_dir)
        layout = parallel.initialize(config.model, config.trainer)
        feed, engine = make_feed(config, dataset, layout), make_engine(config, layout, shape, dataset.sources)
        if random_weights:
            self.feed = dataclasses.replace(feed, reference=NoReference())
            for parameter in engine.target.chunks[0].parameters():
                parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
        else:
            (self.feed,) = with_references(config, engine, [feed])
            weights.load_hf_weights(engine.target, config.model.path, layout)
        self.engine = with_optimizer(config, engine)
        self.total = 10**6
        self.log = RunLog(config, directory, self.total, 0, layout.is_main)
        self.stopping, self.done = Stopping(layout.device), 0

    def step(self) -> None:
        """One pass of the loop: batch, step, log."""
        from fuserl_megatron.train.loop import one_step

        one_step(self.config, self.engine, self.feed, self.log, self.done, self.total, self.stopping)
        self.done += 1
