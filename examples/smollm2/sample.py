"""Samples responses from SmolLM2 under the four ways of asking in `sources.py` and scores them by rule.

    python examples/smollm2/sample.py --model runs/smollm2/hf --out examples/smollm2/data

Writes `sft.jsonl` and `po.jsonl` (one record a line: prompt, source, response, reward, meta) and `heldout.jsonl`
(prompts only). The prompt of a record is the plain one: the help a source had is not in it.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from generate import generate
from sources import SOURCES
from tasks import FAMILIES, make_tasks, reward
from transformers import AutoModelForCausalLM, AutoTokenizer


def sample_split(model, tokenizer, tasks, args, seed: int) -> list[dict]:
    """Returns the records of every task and source, ordered by task, source and sample."""
    by_source = {}
    for number, source in enumerate(SOURCES):
        start = time.monotonic()
        by_source[source.name] = answers = generate(
            model,
            tokenizer,
            [source.chat(task) for task in tasks],
            num_samples=args.num_samples,
            max_new_tokens=args.max_new_tokens,
            temperature=source.temperature,
            top_p=source.top_p,
            batch_size=args.batch_size,
            seed=seed + number,
        )
        count = sum(answer.num_tokens for group in answers for answer in group)
        seconds = time.monotonic() - start
        print(f"  {source.name}: {count} tokens, {seconds:.0f} s, {count / seconds:.0f} tokens/s", flush=True)
    return [
        {
            "prompt": task.messages,
            "source": source.name,
            "response": answer.text,
            "reward": reward(task, answer.text, answer.cut_off),
            "meta": {"family": task.family, "cut_off": answer.cut_off},
        }
        for i, task in enumerate(tasks)
        for source in SOURCES
        for answer in by_source[source.name][i]
    ]


def table(records: list[dict], num_samples: int) -> str:
    """Returns mean and best-of-N reward of each source and family as text."""
    lines = [f"{'mean / best of N':18}" + "".join(f"{source.name:>14}" for source in SOURCES)]
    for family in (*FAMILIES, "all"):
        cells = []
        for source in SOURCES:
            found = [
                r["reward"] for r in records if r["source"] == source.name and family in (r["meta"]["family"], "all")
            ]
            best = [max(found[i : i + num_samples]) for i in range(0, len(found), num_samples)]
            cells.append(f"{statistics.mean(found):.2f} / {statistics.mean(best):.2f}" if found else "-")
        lines.append(f"{family:18}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def write_jsonl(path: Path, records: list[dict]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="directory written by get_model.py")
    parser.add_argument("--out", type=Path, required=True, help="directory of the three JSONL files")
    parser.add_argument("--per-family", type=int, default=20, help="prompts of each family in sft and in po")
    parser.add_argument("--heldout-per-family", type=int, default=12)
    parser.add_argument("--num-samples", type=int, default=4, help="responses per prompt and source")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16, help="prompts; times num-samples rows")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--splits", nargs="+", choices=("sft", "po", "heldout"), default=["heldout", "sft", "po"])
    args = parser.parse_args()
    if not (Path(args.model) / "config.json").is_file():
        print(
            f"error: --model {args.model}: no Hugging Face directory there; make it with get_model.py", file=sys.stderr
        )
        return 2
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in args.splits:
        tasks = make_tasks(split, args.heldout_per_family if split == "heldout" else args.per_family)
        if split == "heldout":
            records = [
                {"prompt": task.messages, "meta": {"family": task.family, "expected": task.expected}} for task in tasks
            ]
        else:
            start = time.monotonic()
            records = sample_split(model, tokenizer, tasks, args, args.seed if split == "sft" else args.seed + 1000)
            print(f"{split}: {len(tasks)} prompts, {len(records)} responses, {time.monotonic() - start:.0f} s")
            print(table(records, args.num_samples))
        write_jsonl(args.out / f"{split}.jsonl", records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
