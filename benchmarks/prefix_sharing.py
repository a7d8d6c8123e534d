"""What prefix sharing gives: groups per second with it over without, against the law M (P + R) / (P + M R).

    python benchmarks/prefix_sharing.py --json prefix_sharing.json --plot prefix_sharing.svg

P tokens of prompt, R of each of M responses; the trainer's whole step (FuseSFT) on one CPU thread, both settings in
turns. Rows are as long as one shared group, without sharing as long as fit M responses best, so that neither side is
charged for padding that the other has not; what is left of it is in the figures (`padding`). Micro-batches have about
as many positions on both sides.

The law counts tokens. A step also does work that does not grow with them (optimizer, log line), and attention, which
grows faster: the model is wide enough (7 million weights) for the matrix products to count most.
"""

import argparse
import math
import tempfile
from pathlib import Path

from _cases import SFT, Trainer, add_common_options, build_data, run_config, save_model, write_records, write_up
from _turns import Requests, ratio, take_turns

SHAPES = [(160, 40, 8), (100, 100, 8), (40, 160, 8), (160, 40, 4), (100, 100, 4), (160, 40, 2)]
QUICK = [(160, 40, 8), (100, 100, 4)]
PROMPTS = 8  # a step; with one, a turn is a fraction of a second and AdamW 6 % of it
GOAL = 0.10


def prepare(root: Path, shapes: list[tuple[int, int, int]]) -> None:
    """The model, and a data set of each shape: M sources with one response each."""
    save_model(
        root / "model",
        max_position_embeddings=512,
        hidden_size=384,
        intermediate_size=1024,
        head_dim=64,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    for prompt, response, count in shapes:
        where = root / f"{prompt}-{response}-{count}"
        where.mkdir()
        (where / "model").symlink_to(root / "model")
        write_records(where / "records.jsonl", 8, count, prompt, response, responses=1, jitter=0.0)
        build_data([where / "records.jsonl"], root / "model", where / "data", 512)


def config(where: Path, sharing: str):
    """The run with or without sharing; every row and micro-batch is full."""
    prompt, response, count = map(int, where.name.split("-"))
    law = count * (prompt + response) / (prompt + count * response)
    # micro-batches of about as many positions on both sides: products of few rows are slower for each of them
    groups = min((1, 2, 4), key=lambda n: abs(math.log(n / law)))
    rows = dict(seq_length=prompt + response * count - 1, rows=groups)
    if sharing == "off":
        together = max(n for n in range(1, count + 1) if count % n == 0 and n * (prompt + response - 1) <= 900)
        rows = dict(seq_length=together * (prompt + response - 1), rows=count // together)
    return run_config(where, SFT, prompts=PROMPTS, share=sharing, name=sharing, **rows)


def measure(root: Path, shape: tuple[int, int, int], turns: int, steps: int, threads: int) -> dict:
    """One point."""
    prompt, response, count = shape
    where = root / f"{prompt}-{response}-{count}"
    commands = {sharing: [__file__, "--worker", str(where), sharing] for sharing in ("on", "off")}
    times, facts = take_turns(commands, turns, steps, threads)
    found, law = ratio(times["off"], times["on"]), count * (prompt + response) / (prompt + count * response)
    print(
        f"P {prompt:3d} R {response:3d} M {count}: {found['median']:.2f}x (fastest turns {found['of_minima']:.2f}x, "
        f"processor time {found['cpu']:.2f}x), law {law:.2f}x: {found['median'] / law - 1:+.1%}",
        flush=True,
    )
    return dict(prompt=prompt, response=response, responses=count, law=law, ratio=found, facts=facts, times=times)


def worker(where: Path, sharing: str) -> None:
    """One of the two processes."""
    requests = Requests()
    trainer = Trainer(config(where, sharing))
    plan = trainer.feed.sampler.step(0)
    requests.serve(trainer.step, positions=plan.real_tokens, padding=plan.padding_share)


def plot(rows: list[dict], path: str) -> None:
    """Measured against the law."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4, 3.4))
    top = max(r["law"] for r in rows) * 1.1
    axes.plot([1, top], [1, top], color="black", linewidth=0.8, label="law")
    axes.fill_between([1, top], [0.9, 0.9 * top], [1.1, 1.1 * top], alpha=0.15, label="10 %")
    axes.plot([r["law"] for r in rows], [r["ratio"]["median"] for r in rows], "o", label="measured")
    axes.set_xlabel("M (P + R) / (P + M R)")
    axes.set_ylabel("groups/s with / without sharing")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of each side in one turn")
    parser.add_argument("--quick", action="store_true", help="2 shapes, 3 turns")
    add_common_options(parser)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(Path(options.worker[0]), options.worker[1])
    shapes, turns = (QUICK, 3) if options.quick else (SHAPES, options.turns)
    steps = 1 if options.quick else options.steps
    with tempfile.TemporaryDirectory(prefix="fuserl-prefix-") as folder:
        prepare(Path(folder), shapes)
        rows = [measure(Path(folder), shape, turns, steps, options.threads) for shape in shapes]
    off = max(abs(r["ratio"]["median"] / r["law"] - 1) for r in rows)
    print(f"furthest from the law: {off:.1%} (goal: within {GOAL:.0%})")
    write_up(options, rows, plot)


if __name__ == "__main__":
    main()
