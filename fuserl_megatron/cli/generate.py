"""`fuserl generate`: answers of models in this process, side by side."""

import argparse
import json
import sys
from typing import Any

from fuserl_megatron.cli.options import Jobs, add_command
from fuserl_megatron.util.errors import UserError


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "generate",
        run,
        "answers of one or several models, side by side",
        """examples:
  fuserl generate runs/fusepo/hf --prompt "Name three colours." --max-new-tokens 8
  fuserl generate models/target runs/fusepo/hf --prompts heldout.jsonl --count 1 --temperature 0.8 --max-new-tokens 8

MODEL is a Hugging Face directory or hub name. Prompts are those of --prompt, the `prompt` fields of --prompts, or lines
typed on standard input. Runs with transformers in this process; for many prompts use `fuserl sample`.
""",
    )
    command.add_argument("models", nargs="+", metavar="MODEL", help="what is asked")
    command.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    command.add_argument("--prompts", metavar="FILE", help="JSONL or another file with `prompt` fields")
    command.add_argument("--first", type=int, default=5, metavar="N", help="prompts of the file (default 5)")
    command.add_argument("--system", metavar="TEXT", help="a system message before each prompt of --prompt")
    command.add_argument("--count", type=int, default=1, metavar="N", help="answers of each model (default 1)")
    command.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default 256")
    command.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    command.add_argument("--json", metavar="FILE", help="also write one JSON object a line there")


def run(options: argparse.Namespace) -> int:
    """`fuserl generate`."""
    for name in ("count", "max_new_tokens", "first"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1.")
    if options.temperature < 0 or (options.count > 1 and options.temperature == 0):
        raise UserError(
            f"--temperature {options.temperature:g}: must be 0 (greedy, one answer) or above; "
            "--temperature 0.8 would work."
        )
    from fuserl_megatron.making.generate import side_by_side
    from fuserl_megatron.util.text import printable

    prompts = _prompts(options)
    lines, before = [], None
    given = (options.count, options.max_new_tokens, options.temperature, options.seed)
    for found in side_by_side(options.models, prompts, *given):
        if found["prompt"] != before:
            before = found["prompt"]
            print(f"\n>>> {printable(before[-1]['content'], keep=chr(10))}")
        for answer in found["answers"]:
            print(f"--- {found['model']}{' (cut)' if answer['cut'] else ''}")
            print(printable(answer["text"], keep="\n\t"), flush=True)
        lines.append(json.dumps(found) + "\n")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.writelines(lines)
    return 0


def _prompts(options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Messages of each prompt, the same one once."""
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    found = [[*system, {"role": "user", "content": text}] for text in options.prompt or ()]
    if options.prompts:
        from fuserl_megatron.making.generate import as_messages
        from fuserl_megatron.making.prompts import PromptList

        prompts = PromptList([options.prompts])
        import numpy as np

        wanted = np.arange(len(prompts)) < options.first
        found += [as_messages(prompt.messages) for prompt in prompts.read(wanted)]
    if not found:
        if sys.stdin.isatty():
            print("A prompt a line, Ctrl-D to end:", file=sys.stderr)
        found = [[*system, {"role": "user", "content": line.strip()}] for line in sys.stdin if line.strip()]
    if not found:
        raise UserError("no prompt: give --prompt TEXT, --prompts FILE, or lines on standard input")
    return found
