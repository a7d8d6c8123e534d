"""Writes the inputs of a run: prompts to train on, held-out prompts, and one solved example of each family.

    python examples/real_sources/prompts.py --out runs/real_sources --train 15 --heldout 8

The families, their rules and the split into lists that share nothing are those of examples/smollm2.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "smollm2"))
from sources import DEMONSTRATIONS
from tasks import FAMILIES, make_tasks


def write(file: Path, rows: list[dict]) -> None:
    """Writes one JSON object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{file}: {len(rows)} rows")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=15, help="training prompts of each of the eight families")
    parser.add_argument("--heldout", type=int, default=8, help="held-out prompts of each family, at most 12")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split, name, count in (("sft", "train", args.train), ("heldout", "heldout", args.heldout)):
        tasks = make_tasks(split, count)
        meta = [{"family": task.family, "expected": task.expected} for task in tasks]
        rows = [{"prompt": task.prompt, "meta": known} for task, known in zip(tasks, meta, strict=True)]
        write(args.out / f"{name}.jsonl", rows)
    shown = [DEMONSTRATIONS[family][0] for family in FAMILIES]
    write(args.out / "demonstrations.jsonl", [{"prompt": question, "response": answer} for question, answer in shown])
    return 0


if __name__ == "__main__":
    sys.exit(main())
