"""Greedy answers to the held-out prompts, scored by rule: mean reward over all and per family, with 95 % intervals.

    python examples/smollm2/evaluate.py --model runs/smollm2/hf --out runs/smollm2/before.json
    python examples/smollm2/evaluate.py --model runs/smollm2/fused --baseline runs/smollm2/before.json \
        --out runs/smollm2/after.json

With --baseline the differences to an earlier result are given too, prompt by prompt (paired). All intervals are
bootstrap intervals over prompts, 10,000 resamples, fixed seed; over all prompts they are resampled within families.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from generate import generate
from tasks import FAMILIES, Task, reward
from transformers import AutoModelForCausalLM, AutoTokenizer

HELDOUT = Path(__file__).parent / "data" / "heldout.jsonl"
NUM_RESAMPLES = 10_000


def read_tasks(path: Path) -> list[Task]:
    """Reads the held-out prompts and what their rules look for."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Task(r["meta"]["family"], r["prompt"][-1]["content"], tuple(r["meta"]["expected"])) for r in rows]


def interval(values_by_family: dict[str, list[float]]) -> dict[str, float]:
    """Returns mean, low, high (95 %, bootstrap within families) and the number of prompts.

    Args:
        values_by_family: rewards, or differences of rewards, of the prompts of each family.
    """
    rng = np.random.default_rng(0)
    total = np.zeros(NUM_RESAMPLES)
    for values in values_by_family.values():
        array = np.asarray(values)
        total += array[rng.integers(len(array), size=(NUM_RESAMPLES, len(array)))].sum(axis=1)
    everything = np.concatenate([np.asarray(values) for values in values_by_family.values()])
    low, high = np.quantile(total / len(everything), (0.025, 0.975))
    return {
        "mean": round(float(everything.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "num_prompts": len(everything),
    }


def summarize(families: list[str], values: list[float]) -> dict[str, dict[str, float]]:
    """Returns `interval` over all prompts and of each family."""
    groups = {name: [v for f, v in zip(families, values, strict=True) if f == name] for name in FAMILIES}
    groups = {name: found for name, found in groups.items() if found}
    return {"all": interval(groups)} | {name: interval({name: found}) for name, found in groups.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--heldout", type=Path, default=HELDOUT)
    parser.add_argument("--out", type=Path, help="JSON file to write; standard output without it")
    parser.add_argument("--baseline", type=Path, help="an earlier result on the same prompts, to compare with")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    start = time.monotonic()
    try:
        tasks = read_tasks(args.heldout)
        baseline = json.loads(args.baseline.read_text(encoding="utf-8")) if args.baseline else None
        if baseline and [a["prompt"] for a in baseline["answers"]] != [task.prompt for task in tasks]:
            raise ValueError(f"{args.baseline}: its prompts are not those of {args.heldout}; evaluate it again")
        if not (Path(args.model) / "config.json").is_file():
            raise ValueError(f"--model {args.model}: no Hugging Face directory there (config.json is missing)")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    chats = [task.messages for task in tasks]
    found = generate(model, tokenizer, chats, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
    answers = [answer for (answer,) in found]
    families = [task.family for task in tasks]
    rewards = [reward(task, answer.text, answer.cut_off) for task, answer in zip(tasks, answers, strict=True)]
    result = {"model": args.model, "reward": summarize(families, rewards)}
    result["cut_off"] = sum(answer.cut_off for answer in answers)
    if baseline:
        before = [answer["reward"] for answer in baseline["answers"]]
        result["gain"] = summarize(families, [b - a for a, b in zip(before, rewards, strict=True)])
    result["seconds"] = round(time.monotonic() - start, 1)
    result["answers"] = [
        {"prompt": task.prompt, "family": task.family, "response": answer.text, "reward": value}
        for task, answer, value in zip(tasks, answers, rewards, strict=True)
    ]
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
        for part in ("reward", "gain") if baseline else ("reward",):
            for name, row in result[part].items():
                span = f"[{row['low']:6.3f}, {row['high']:6.3f}]"
                print(f"{part:7}{name:10}{row['mean']:7.3f}  {span}  n {row['num_prompts']}")
        print(f"{result['cut_off']} of {len(tasks)} answers cut off; {result['seconds']:.0f} s")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
