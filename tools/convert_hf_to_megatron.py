"""Hugging Face directory -> Megatron distributed checkpoint, for batch jobs: one process, no GPU, no launcher.

    python tools/convert_hf_to_megatron.py models/target checkpoints/target
    python tools/convert_hf_to_megatron.py models/target checkpoints/target --dtype bfloat16 --report report.json

As `fuserl convert hf-to-megatron`, and besides `--report` writes what it took. Exit codes: 0 done, 2 one line says what
to put right, 130 and 143 interrupted.
"""

import argparse
import sys

from fuserl_megatron.cli.convert import batch_conversion, to_megatron


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Hugging Face directory with config, safetensors and tokenizer")
    parser.add_argument("destination", help="checkpoint root to write")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin (weights only)")
    return batch_conversion(parser, to_megatron)


if __name__ == "__main__":
    sys.exit(main())
