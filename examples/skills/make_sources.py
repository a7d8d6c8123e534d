"""Make everything the experiment commits, from nothing: sources, sampled responses with rewards, the weak target.

    python examples/skills/make_sources.py --work build/skills            # everything, about 14 minutes on one core
    python examples/skills/make_sources.py --work build/skills --steps gpt2 qwen2     # only some of the steps

Steps, each skipped if its result lies in the work directory already (delete a file there to make it again):

    gpt2 qwen2 mistral    train one source on right answers: mostly its own two skills, a little of the other four
    gpt2-careless ...     a few more steps in which some answers are careless: its samples now vary in quality
    pretrained            train the target's architecture on all six skills
    target                tune it towards careless answers: weak, with latent skills that a little data brings out
    data                  sample N responses per prompt and source, score them, write data/
    export                write target/

Held-out and training prompts are never used to train a source or the target. The same seed on the same machine and
torch version gives the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import models  # noqa: E402
import skills  # noqa: E402
from training import sample, train  # noqa: E402

NUM_HELDOUT = 200  # prompts per skill
NUM_SFT, NUM_PO = 200, 300  # training prompts per skill and stage, 4 : 6
NUM_RESPONSES = 4  # sampled responses per prompt and source
TEMPERATURE = 0.9
OWN_SHARE = 0.96  # of a source's training examples, those of its own skills
BATCH_SIZE = 128  # fresh examples per optimiser step


@dataclass(frozen=True)
class Stage:
    """One stretch of training: which architecture, from which earlier stage, for how long, on what."""

    model: str
    num_steps: int
    peak_lr: float
    start: str | None = None  # the stage it continues; None starts from random weights
    careless_share: float = 0.0  # of the training answers, those that are careless instead of right


STAGES = {
    "gpt2": Stage("gpt2", 500, 2e-3),
    "qwen2": Stage("qwen2", 300, 3e-3),
    "mistral": Stage("mistral", 1200, 2e-3),
    "gpt2-careless": Stage("gpt2", 60, 1e-3, "gpt2", 0.3),
    "qwen2-careless": Stage("qwen2", 60, 1e-3, "qwen2", 0.3),
    "mistral-careless": Stage("mistral", 60, 1e-3, "mistral", 0.3),
    "pretrained": Stage("target", 1200, 3e-3),
    "target": Stage("target", 100, 1e-3, "pretrained", 0.75),
}
SHARD_BYTES = 1_000_000  # no committed file above 1 MiB
STEPS = (*STAGES, "data", "export")


def prompt_sets(seed: int) -> dict[str, list[skills.Task]]:
    """The three disjoint prompt sets `heldout`, `train_sft` and `train_po`, skills in turn."""
    sizes = {"heldout": NUM_HELDOUT, "train_sft": NUM_SFT, "train_po": NUM_PO}
    sets: dict[str, list[skills.Task]] = {name: [] for name in sizes}
    for skill in skills.SKILLS:
        tasks = skills.make_tasks(seed, skill, sum(sizes.values()))
        for name, size in sizes.items():
            sets[name] += tasks[:size]
            tasks = tasks[size:]
    for name, tasks in sets.items():
        random.Random(f"{seed}/{name}").shuffle(tasks)
    return sets


def train_stage(name: str, model, tokenizer, seed: int, reserved: set[str]) -> None:
    """Train `model` in place as STAGES[name] says, on fresh examples whose prompts are not in `reserved`."""
    stage = STAGES[name]
    own = models.SOURCES.get(stage.model, skills.SKILLS)
    others = [skill for skill in skills.SKILLS if skill not in own]
    rng = random.Random(f"{seed}/{name}")
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {type(model).__name__}, {num_parameters:,} parameters, {len(tokenizer)} tokens", flush=True)

    def draw():
        tasks = []
        while len(tasks) < BATCH_SIZE:
            task = skills.make_task(rng, rng.choice(own if not others or rng.random() < OWN_SHARE else others))
            if task.prompt not in reserved:
                tasks.append(task)
        prompts = [task.prompt for task in tasks]
        careless = [rng.random() < stage.careless_share for _ in tasks]
        answers = [skills.careless_answer(t.prompt) if c else t.answer for t, c in zip(tasks, careless, strict=True)]
        return prompts, answers

    probe = [task for skill in skills.SKILLS for task in skills.make_tasks(seed + 1, skill, 50, reserved)]
    train(model, tokenizer, draw, stage.num_steps, stage.peak_lr, probe, name)


def write_records(directory: Path, name: str, records: list[dict]) -> None:
    """Write records as `name.00.jsonl`, `name.01.jsonl`, ...: a new shard whenever SHARD_BYTES is reached."""
    for old in directory.glob(f"{name}.*.jsonl"):
        old.unlink()
    shards, size = [[]], 0
    for record in records:
        line = json.dumps(record, separators=(",", ":")) + "\n"
        if size + len(line) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(line)
        size += len(line)
    for i, lines in enumerate(shards):
        (directory / f"{name}.{i:02d}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_data(loaded: dict, sets: dict[str, list[skills.Task]], seed: int, directory: Path) -> None:
    """Sample, score and write train_sft, train_po, heldout and the sources' greedy held-out answers."""
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    for name in ("train_sft", "train_po"):
        by_prompt: dict[str, list[dict]] = {task.prompt: [] for task in sets[name]}
        num_empty = 0
        for source, (model, tokenizer) in loaded.items():
            torch.manual_seed(seed)
            prompts = [task.prompt for task in sets[name] for _ in range(NUM_RESPONSES)]
            for prompt, response in zip(prompts, sample(model, tokenizer, prompts, TEMPERATURE), strict=True):
                if not response.strip():  # a record without a response is no record: the product refuses it
                    num_empty += 1
                    continue
                score = skills.reward(prompt, response)
                record = {"prompt": prompt, "source": source, "response": response, "reward": score}
                by_prompt[prompt].append(record)
        write_records(directory, name, [record for records in by_prompt.values() for record in records])
        print(f"{name}: {len(by_prompt)} prompts; {num_empty} empty responses left out")
        print_source_table(name, by_prompt)
    tasks = sets["heldout"]
    lines = [json.dumps({"skill": t.skill, "prompt": t.prompt, "answer": t.answer}) for t in tasks]
    (directory / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with open(directory / "source_greedy.jsonl", "w", encoding="utf-8") as file:
        for source, (model, tokenizer) in loaded.items():
            prompts = [task.prompt for task in tasks]
            for prompt, response in zip(prompts, sample(model, tokenizer, prompts, 0.0), strict=True):
                file.write(json.dumps({"source": source, "prompt": prompt, "response": response}) + "\n")


def print_source_table(name: str, by_prompt: dict[str, list[dict]]) -> None:
    """Per source and skill: mean reward, mean best-of-N reward, share of prompts that give a preference pair."""
    from rich.console import Console
    from rich.table import Table

    columns = ("mean reward", "best of N", "pairs")
    table = Table("source", *skills.SKILLS, "all", title=f"{name}: {' / '.join(columns)}")
    for source in models.SOURCES:
        cells = []
        for wanted in (*skills.SKILLS, None):
            rewards = [
                [record["reward"] for record in records if record["source"] == source]
                for prompt, records in by_prompt.items()
                if wanted in (None, skills.skill_of(prompt))
            ]
            mean = sum(map(sum, rewards)) / sum(map(len, rewards))
            best = sum(map(max, rewards)) / len(rewards)
            pairs = sum(max(r) > min(r) for r in rewards) / len(rewards)
            cells.append(f"{mean:.2f}/{best:.2f}/{pairs:.2f}")
        table.add_row(source, *cells)
    Console(width=150).print(table)


def export_target(model, directory: Path) -> None:
    """Write the target as a Hugging Face directory, weights in bfloat16 to stay below 1 MiB."""
    import torch
    from transformers import GenerationConfig

    model = model.to(torch.bfloat16)
    tokenizer = models.build_target_tokenizer()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=12, do_sample=False
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # transformers 5 writes a class name and a key that transformers 4 does not read; both read these
    config_path = directory / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [models.USER, models.ASSISTANT])
    config.pop("backend", None)
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "model.safetensors").chmod(0o644)


def main(argv: list[str] | None = None) -> int:
    """Run the steps asked for; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where trained weights are kept between runs")
    parser.add_argument("--out", type=Path, default=HERE, help="where data/ and target/ are written")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    args.work.mkdir(parents=True, exist_ok=True)
    sets = prompt_sets(args.seed)
    reserved = {task.prompt for tasks in sets.values() for task in tasks}

    def load(name: str):
        stage, path = STAGES[name], args.work / f"{name}.pt"
        torch.manual_seed(args.seed)
        tokenizer = models.build_tokenizer(stage.model)
        model = load(stage.start)[0] if stage.start else models.build_model(stage.model, tokenizer)
        if not path.exists():
            train_stage(name, model.train(), tokenizer, args.seed, reserved)
            temporary = path.with_suffix(".tmp")
            torch.save(model.state_dict(), temporary)
            temporary.rename(path)  # a file under its final name is a finished one
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval(), tokenizer

    for step in args.steps:
        if step == "data":
            make_data({name: load(f"{name}-careless") for name in models.SOURCES}, sets, args.seed, args.out / "data")
        elif step == "export":
            export_target(load("target")[0], args.out / "target")
        else:
            load(step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
