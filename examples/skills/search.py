"""Choose FusePO's settings for compare.py on prompts of its own: never on the held-out ones, with seeds of its own.

    python examples/skills/search.py --dir runs/search

FuseSFT stops after one pass; each setting of GRID then starts from it. Accuracy is taken on fresh prompts of the
generator that are neither held-out nor training prompts. What is there already is not repeated.
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compare import HERE, build, train_and_score
from evaluate import read_jsonl
from skills import SKILLS, make_tasks

NUM_PROMPTS = 200  # per skill
TASK_SEED = 4242
ONE_PASS = ["trainer.max_epochs=1"]

# loss -> settings to try
GRID = {
    "DPO": [
        "beta=0.1 lr=1e-4",
        "beta=0.1 lr=3e-4",
        "beta=0.5 lr=1e-4 min_reward_gap=0.4",
        "beta=0.5 lr=1e-4 rpo_alpha=1",
        "beta=0.5 lr=1e-4 rpo_alpha=1 min_reward_gap=0.4",
        "beta=0.5 lr=3e-4 rpo_alpha=1",
        "beta=0.1 lr=3e-4 rpo_alpha=1",
    ],
    "SimPO": ["beta=2 lr=1e-4 min_reward_gap=0.4", "beta=2 lr=3e-4 rpo_alpha=1", "beta=10 lr=3e-4 rpo_alpha=1"],
    "RLOO": ["lr=3e-5", "lr=1e-4 rpo_alpha=1", "lr=3e-4 rpo_alpha=1"],
}


def settings_of(loss: str, short: str) -> list[str]:
    """The command line's settings of one entry of GRID."""
    sections = ["optim" if part.startswith("lr=") else "objective" for part in short.split()]
    named = [f"{section}.{part}" for section, part in zip(sections, short.split(), strict=True)]
    return [f"objective=fusepo_{loss.lower()}", *named]


def fresh_prompts(path: Path) -> Path:
    """Write NUM_PROMPTS tasks a skill that no other file of the experiment holds."""
    files = [*(HERE / "data").glob("train_*.jsonl"), HERE / "data" / "heldout.jsonl"]
    used = {record["prompt"] for file in files for record in read_jsonl(file)}
    tasks = [task for skill in SKILLS for task in make_tasks(TASK_SEED, skill, NUM_PROMPTS, used)]
    path.write_text("".join(json.dumps({"skill": t.skill, "prompt": t.prompt}) + "\n" for t in tasks))
    return path


def main() -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="runs/search", type=Path)
    parser.add_argument("--seeds", default=[101, 102], type=int, nargs="+")
    options = parser.parse_args()
    root = options.dir.resolve()
    root.mkdir(parents=True, exist_ok=True)
    data = {stage: build(root / stage, [f"{HERE}/data/train_{stage}.*.jsonl"]) for stage in ("sft", "po")}
    prompts = fresh_prompts(root / "prompts.jsonl")

    def one_seed(seed: int) -> dict[str, float]:
        place = root / f"seed{seed}"
        start, score = train_and_score(place, "FuseSFT", "sft", HERE / "target", data["sft"], seed, ONE_PASS, prompts)
        found = {"FuseSFT": score["mean"]}
        for loss, grid in GRID.items():
            for short in grid:
                settings = settings_of(loss, short)
                _, score = train_and_score(place, f"{loss} {short}", "po", start, data["po"], seed, settings, prompts)
                found[f"{loss} {short}"] = score["mean"]
                print(f"seed {seed}: {loss} {short:50s} {100 * score['mean']:.1f}", flush=True)
        return found

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(one_seed, options.seeds))
    print("| from FuseSFT | mean accuracy, % | by seed |\n|---|---:|---|")
    for name in found[0]:
        values = [100 * f[name] for f in found]
        print(f"| {name} | {statistics.mean(values):.1f} | {' '.join(f'{v:.1f}' for v in values)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
