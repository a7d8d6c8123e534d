"""Hugging Face directory -> Megatron distributed checkpoint, for batch jobs: one process, no GPU, no launcher.

    python tools/convert_hf_to_megatron.py models/target checkpoints/target
    python tools/convert_hf_to_megatron.py models/target checkpoints/target --dtype bfloat16 --report report.json

As `fuserl convert hf-to-megatron`, and besides: SIGTERM cleans up as Ctrl-C does, and `--report` writes what
it took. Exit codes: 0 done, 2 one line says what to put right, 130 and 143 interrupted.
"""

import argparse
import json
import resource
import signal
import sys
import time
from pathlib import Path

from fuserl_megatron.cli import one_line
from fuserl_megatron.config.schema import UserError


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Hugging Face directory with config, safetensors and tokenizer")
    parser.add_argument("destination", help="checkpoint root to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the source's")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin (weights only)")
    parser.add_argument("--force", action="store_true", help="replace a non-empty destination")
    parser.add_argument("--report", metavar="FILE", help="write seconds, bytes and peak memory there as JSON")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half-written stays
    started = time.monotonic()
    try:
        from fuserl_megatron.mcore import offline

        written = offline.hf_to_megatron(
            options.source,
            options.destination,
            dtype=options.dtype,
            make_vocab_size_divisible_by=options.make_vocab_size_divisible_by,
            force=options.force,
            allow_pickle=options.allow_pickle,
        )
        report = {
            "written": str(written),
            "bytes": sum(file.stat().st_size for file in Path(written).rglob("*") if file.is_file()),
            "seconds": round(time.monotonic() - started, 3),
            "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        print(json.dumps(report))
        if options.report:
            Path(options.report).write_text(json.dumps(report) + "\n")
    except (UserError, OSError) as error:
        print(f"{parser.prog}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
