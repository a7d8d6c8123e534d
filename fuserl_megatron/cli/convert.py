"""`fuserl convert`: Hugging Face directory <-> Megatron checkpoint; also what tools/ call."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from fuserl_megatron.cli.exit_codes import exit_code
from fuserl_megatron.cli.options import Jobs, add_command
from fuserl_megatron.util.errors import UserError


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "convert",
        None,
        "Hugging Face directory <-> Megatron checkpoint",
        """examples:
  fuserl convert hf-to-megatron models/target checkpoints/target
  fuserl convert megatron-to-hf runs/fuserl exported --dtype bfloat16
""",
    )
    directions = command.add_subparsers(title="directions", metavar="DIRECTION", required=True)
    _add_directions(directions)


def _add_directions(directions: Jobs) -> None:
    to_megatron = add_command(
        directions,
        "hf-to-megatron",
        hf_to_megatron,
        "Hugging Face directory -> Megatron checkpoint of iteration 0, for any layout",
        """example:
  fuserl convert hf-to-megatron models/target checkpoints/target

Training starts from a Hugging Face directory by itself; this is for other Megatron programs.
""",
    )
    to_hf = add_command(
        directions,
        "megatron-to-hf",
        megatron_to_hf,
        "Megatron checkpoint of any layout -> Hugging Face directory",
        """examples:
  fuserl convert megatron-to-hf runs/fuserl exported --dtype bfloat16
  fuserl convert megatron-to-hf checkpoints/other exported --hf models/target --max-shard-size 2GB
""",
    )
    for direction in (to_megatron, to_hf):
        direction.add_argument("source", metavar="SRC")
        direction.add_argument("destination", metavar="DST")
        direction.add_argument(
            "--dtype", choices=["float32", "bfloat16", "float16"], help="of the written weights (default: the source's)"
        )
        direction.add_argument("--force", action="store_true", help="replace an existing destination")
    to_megatron.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="padding of the vocabulary (128)"
    )
    to_megatron.add_argument(
        "--allow-pickle", action="store_true", help="also read pytorch_model.bin, with torch's weights-only loader"
    )
    to_hf.add_argument(
        "--hf", metavar="DIR", help="config and tokenizer (default: what the checkpoint or its run's config names)"
    )
    to_hf.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one safetensors file (default 5GB)")


def hf_to_megatron(options: argparse.Namespace) -> int:
    """`fuserl convert hf-to-megatron`."""
    written = to_megatron(options)
    print(f"written: {written}", (written / "megatron_lm_flags.txt").read_text().rstrip(), sep="\n")
    return 0


def megatron_to_hf(options: argparse.Namespace) -> int:
    """`fuserl convert megatron-to-hf`."""
    options.max_shard_bytes = _bytes(options.max_shard_size)
    print(f"written: {to_hf(options)}")
    return 0


def to_megatron(options: argparse.Namespace) -> Path:
    """Convert a Hugging Face directory, here and in tools/; returns the directory written."""
    from fuserl_megatron.convert import offline

    return offline.hf_to_megatron(
        options.source,
        options.destination,
        dtype=options.dtype,
        make_vocab_size_divisible_by=options.make_vocab_size_divisible_by,
        force=options.force,
        allow_pickle=options.allow_pickle,
    )


def to_hf(options: argparse.Namespace) -> Path:
    """Convert a Megatron checkpoint, here and in tools/; returns the directory written."""
    from fuserl_megatron.convert import offline

    return offline.megatron_to_hf(
        options.source,
        options.destination,
        hf=options.hf,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_bytes,
        force=options.force,
    )


def batch_conversion(parser: argparse.ArgumentParser, convert: Callable[[argparse.Namespace], Path]) -> int:
    """The converters of tools/: as a command here, and besides one line of JSON on what it took.

    The parser knows the options of one direction, those of both are added; `convert` returns the directory written.
    """
    import resource

    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the source's")
    parser.add_argument("--force", action="store_true", help="replace a non-empty destination")
    parser.add_argument("--report", metavar="FILE", help="write seconds, bytes and peak memory there as JSON")
    options = parser.parse_args()

    def run() -> int:
        started = time.monotonic()
        written = convert(options)
        report = {
            "written": str(written),
            "bytes": sum(file.stat().st_size for file in written.rglob("*") if file.is_file()),
            "seconds": round(time.monotonic() - started, 3),
            "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        print(json.dumps(report))
        if options.report:
            Path(options.report).write_text(json.dumps(report) + "\n")
        return 0

    return exit_code(parser.prog, run)


def _bytes(text: str) -> int:
    """Decimal units as in 5GB, 500MB; a plain number is bytes."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = (text[:-2], text[-2:].upper()) if text[-2:].upper() in units else (text, "")
    try:
        size = int(float(number) * units.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"--max-shard-size {text}: is no size; 5GB would work.")
    return size
