"""Exact-match accuracy of Hugging Face models on the held-out prompts.

    python examples/skills/evaluate.py MODEL_DIR [MODEL_DIR ...] --out scores.json

Greedy decoding by transformers, left-padded batches, float32. Nothing heavy is imported before a function needs it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # the example is a folder of scripts, not an installed package
    sys.path.insert(0, str(HERE))

from skills import SKILLS, is_exact  # noqa: E402

HELDOUT = HERE / "data" / "heldout.jsonl"
SOURCE_GREEDY = HERE / "data" / "source_greedy.jsonl"
Z95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution


def read_jsonl(path: str | Path) -> list[dict]:
    """One dictionary per line of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]


def greedy_answers(
    model_dir: str | Path, prompts: list[str], batch_size: int = 256, max_new_tokens: int = 10
) -> list[str]:
    """Greedy answers of the model in `model_dir`, one per prompt, in the order of the prompts.

    Args:
        model_dir: a Hugging Face directory with weights, tokenizer and chat template.
        prompts: user turns; the chat template is put around each.
        batch_size: prompts decoded together.
        max_new_tokens: the longest answer; held-out answers have at most 6 tokens and the end-of-turn token.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompts[i]}], tokenize=False, add_generation_prompt=True
            )
            for i in rows
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output_BS = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=max_new_tokens,
            )
        new_BS = output_BS[:, batch["input_ids"].shape[1] :]
        for i, answer in zip(rows, tokenizer.batch_decode(new_BS, skip_special_tokens=True), strict=True):
            answers[i] = answer
    return answers


def wilson_interval(num_right: int, num_prompts: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson 1927): unlike the normal one, sane at 0 and 1."""
    share, z2 = num_right / num_prompts, Z95**2
    centre = (share + z2 / (2 * num_prompts)) / (1 + z2 / num_prompts)
    half = Z95 / (1 + z2 / num_prompts) * math.sqrt(share * (1 - share) / num_prompts + z2 / (4 * num_prompts**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def score_answers(tasks: list[dict], answers: list[str]) -> dict:
    """Accuracy per skill and over all prompts.

    Returns:
        {"mean", "interval" (95 %, Wilson), "num_prompts", "skills": {skill: accuracy}, "right": [0 or 1 per prompt]}.
        Every skill has equally many held-out prompts, so that the mean over prompts is the mean over skills.
    """
    right = [int(is_exact(task["prompt"], answer)) for task, answer in zip(tasks, answers, strict=True)]
    per_skill = {}
    for skill in SKILLS:
        marks = [mark for task, mark in zip(tasks, right, strict=True) if task["skill"] == skill]
        per_skill[skill] = sum(marks) / len(marks)
    return {
        "mean": sum(right) / len(right),
        "interval": list(wilson_interval(sum(right), len(right))),
        "num_prompts": len(right),
        "skills": per_skill,
        "right": right,
    }


def paired_difference(better: dict, worse: dict) -> tuple[float, float]:
    """Difference of two mean accuracies on the same prompts, and half the width of its 95 % interval.

    The prompts are the same for both, so the interval comes from the per-prompt differences (-1, 0 or 1), which is
    narrower than two separate intervals would suggest.
    """
    differences = [a - b for a, b in zip(better["right"], worse["right"], strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return mean, Z95 * math.sqrt(variance / len(differences))


def evaluate_model(model_dir: str | Path, heldout: str | Path = HELDOUT) -> dict:
    """`score_answers` of one Hugging Face directory on the held-out prompts."""
    tasks = read_jsonl(heldout)
    return score_answers(tasks, greedy_answers(model_dir, [task["prompt"] for task in tasks]))


def evaluate_sources(heldout: str | Path = HELDOUT, greedy: str | Path = SOURCE_GREEDY) -> dict[str, dict]:
    """`score_answers` of every source from its stored greedy answers: the sources' weights are not needed.

    Raises:
        ValueError: if a source has not answered every held-out prompt.
    """
    tasks = read_jsonl(heldout)
    answers: dict[str, dict[str, str]] = {}
    for record in read_jsonl(greedy):
        answers.setdefault(record["source"], {})[record["prompt"]] = record["response"]
    for source, by_prompt in answers.items():
        missing = [task["prompt"] for task in tasks if task["prompt"] not in by_prompt]
        if missing:
            raise ValueError(f"{greedy}: source {source!r} has no answer to {missing[0]!r}; run make_sources.py again")
    return {
        source: score_answers(tasks, [by_prompt[task["prompt"]] for task in tasks])
        for source, by_prompt in answers.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Evaluate the directories given on the command line, print the table, write JSON."""
    from report import print_table

    parser = argparse.ArgumentParser(description="Exact-match accuracy of Hugging Face models on the held-out prompts.")
    parser.add_argument("models", nargs="*", help="Hugging Face directories; NAME=DIR gives a row its own name")
    parser.add_argument("--heldout", default=HELDOUT, type=Path)
    parser.add_argument("--no-sources", action="store_true", help="leave the sources' rows out")
    parser.add_argument("--out", type=Path, help="write the scores as JSON to this file")
    args = parser.parse_args(argv)
    scores = {} if args.no_sources else evaluate_sources(args.heldout)
    for model in args.models:
        name, _, directory = model.rpartition("=")
        if not (Path(directory) / "config.json").is_file():
            print(f"evaluate: {directory} is not a Hugging Face model directory (no config.json)", file=sys.stderr)
            return 2
        scores[name or Path(directory).name] = evaluate_model(directory, args.heldout)
    print_table(scores)
    if args.out:
        args.out.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
