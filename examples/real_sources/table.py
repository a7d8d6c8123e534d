"""The held-out rewards of every source and every trained model, with 95 % intervals.

    python examples/real_sources/table.py runs/real_sources/heldout
    python examples/real_sources/table.py --best-source runs/real_sources/fused/score/records.jsonl

A prompt's reward is the mean over its answers. The intervals are those of a bootstrap over prompts (10,000 draws,
seed 0); a difference is taken prompt by prompt, so that hard prompts weigh on both sides. The second form prints the
source with the highest mean reward in training, which is the only figure a choice of one source could go by.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from family_rule import score

from fuserl_megatron.making.finished import finished_rows

ROWS = {
    "gemma": "source: Gemma-3-270M, 8 examples shown",
    "smollm2": "source: SmolLM2-135M, 8 examples shown",
    "before": "target before: SmolLM2-135M, nothing shown",
    "single": "target, FuseSFT on the best single source",
    "uniform": "target, FuseSFT with equal weights",
    "fusesft": "target, FuseSFT",
    "fusepo": "target, FuseSFT + FusePO",
}
DRAWS = 10_000


def rewards_of(directory: Path) -> tuple[list[str], np.ndarray, float]:
    """Returns the prompts' ids in order, their mean rewards [P], and the share of answers that were cut."""
    rewards, cut = defaultdict(list), []
    for row in finished_rows(directory):
        rewards[row["prompt_id"]].append(score(row["prompt"], row["response"], row))
        cut.append(row["finish_reason"] == "length")
    ids = sorted(rewards)
    return ids, np.array([np.mean(rewards[name]) for name in ids]), float(np.mean(cut))


def with_interval(values: np.ndarray, signed: bool = False) -> str:
    """Returns the mean [P] -> text, with the bootstrap's 2.5 and 97.5 percentiles."""
    draws = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.percentile(values[draws].mean(1), (2.5, 97.5))
    form = "+.3f" if signed else ".3f"
    return f"{values.mean():{form}} [{low:{form}}, {high:{form}}]"


def best_source(records: Path) -> str:
    """Returns the source with the highest mean reward in a file of scored records."""
    rewards = defaultdict(list)
    for line in records.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        rewards[record["source"]].append(record["reward"])
    return max(rewards, key=lambda name: np.mean(rewards[name]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("place", type=Path, help="directory of held-out answers, or with --best-source the records")
    parser.add_argument("--best-source", action="store_true")
    args = parser.parse_args()
    if args.best_source:
        print(best_source(args.place))
        return 0
    found = {name: rewards_of(args.place / name) for name in ROWS if (args.place / name / "done.json").is_file()}
    if len({tuple(ids) for ids, _, _ in found.values()}) > 1:
        print("error: the models were not asked the same prompts", file=sys.stderr)
        return 2
    before = found["before"][1]
    print("| model | reward | beside target before | cut |\n|---|---|---|---|")
    for name, (_, values, cut) in found.items():
        gain = "" if name == "before" else with_interval(values - before, signed=True)
        print(f"| {ROWS[name]} | {with_interval(values)} | {gain} | {cut:.1%} |")
    print("\n| difference, prompt by prompt | |\n|---|---|")
    for one, other in (("fusesft", "single"), ("fusesft", "uniform"), ("fusepo", "fusesft"), ("gemma", "smollm2")):
        if one in found and other in found:
            print(
                f"| {ROWS[one]} minus {ROWS[other]} | {with_interval(found[one][1] - found[other][1], signed=True)} |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
