"""Megatron distributed checkpoint -> Hugging Face directory, for batch jobs: one process, no GPU, no launcher.

    python tools/convert_megatron_to_hf.py runs/fuserl exported
    python tools/convert_megatron_to_hf.py checkpoints/other exported --hf models/target --report report.json

As `fuserl convert megatron-to-hf`, and besides `--report` writes what it took. Exit codes: 0 done, 2 one line says what
to put right, 130 and 143 interrupted.
"""

import argparse
import math
import sys
from pathlib import Path

from fuserl_megatron.cli.convert import batch_conversion, to_hf


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint root, one of its iter_* folders, or a run's results folder")
    parser.add_argument("destination", help="Hugging Face directory to write")
    parser.add_argument("--hf", metavar="DIR", help="config and tokenizer, when the checkpoint names none")
    help_gb = "of one weight file (default 5)"
    parser.add_argument("--max-shard-gb", type=_gigabytes, default=5.0, metavar="GB", help=help_gb)
    return batch_conversion(parser, _convert)


def _gigabytes(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no size; 5 would work")
    return float(text)


def _convert(options: argparse.Namespace) -> Path:
    options.max_shard_bytes = int(options.max_shard_gb * 1e9)
    return to_hf(options)


if __name__ == "__main__":
    sys.exit(main())
