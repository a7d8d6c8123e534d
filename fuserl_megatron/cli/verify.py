"""`fuserl verify`: are two models the same?"""

import argparse
import os

from fuserl_megatron.cli.options import Jobs, add_command


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "verify",
        run,
        "are two models the same?",
        """examples:
  fuserl verify models/target checkpoints/target
  fuserl verify runs/fuserl exported --threshold 1e-4
  fuserl verify models/target exported --text my_prompts.txt --max-new-tokens 64 --json report.json

Compares config, tensors (exactly), per-token log-probabilities and greedy continuations, each model computed by its
own path in fp32 on the CPU: transformers for a Hugging Face directory, core for a Megatron checkpoint. Rounding grows
with depth: two ways to compute a model of 30 layers differ by some 3e-5; --threshold 1e-4 is right for real models.
Exit code 0 when everything agrees, 1 otherwise.
""",
    )
    for name in ("a", "b"):
        command.add_argument(name, metavar=name.upper(), help="Hugging Face directory, Megatron checkpoint, or a run")
    command.add_argument("--text", metavar="FILE", help="one text per line to score (default: built-in texts)")
    command.add_argument("--threshold", type=float, default=1e-5, help="largest difference allowed, nats (1e-5)")
    command.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="of the greedy continuations; 0: none (default 32)"
    )
    command.add_argument("--hf", metavar="DIR", help="config and tokenizer, for a checkpoint that names none")
    command.add_argument("--json", metavar="OUT", help="write the figures to this file")


def run(options: argparse.Namespace) -> int:
    """`fuserl verify`."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the comparison is one of fp32 on the CPU; core takes any GPU it sees
    from fuserl_megatron.proofs.verify import verify

    return verify(
        options.a,
        options.b,
        text=options.text,
        threshold=options.threshold,
        json_path=options.json,
        max_new_tokens=options.max_new_tokens,
        hf=options.hf,
    )
