"""Megatron distributed checkpoint -> Hugging Face directory, for batch jobs: one process, no GPU, no launcher.

    python tools/convert_megatron_to_hf.py runs/fuserl exported
    python tools/convert_megatron_to_hf.py checkpoints/other exported --hf models/target --report report.json

As `fuserl convert megatron-to-hf`, and besides: SIGTERM cleans up as Ctrl-C does, and `--report` writes what
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
    parser.add_argument("source", help="checkpoint root, one of its iter_* folders, or a run's results folder")
    parser.add_argument("destination", help="Hugging Face directory to write")
    parser.add_argument("--hf", metavar="DIR", help="config and tokenizer, when the checkpoint names none")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB", help="of one weight file (default 5)")
    parser.add_argument("--force", action="store_true", help="replace a non-empty destination")
    parser.add_argument("--report", metavar="FILE", help="write seconds, bytes and peak memory there as JSON")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half-written stays
    started = time.monotonic()
    try:
        from fuserl_megatron.mcore import offline

        written = offline.megatron_to_hf(
            options.source,
            options.destination,
            hf=options.hf,
            dtype=options.dtype,
            max_shard_bytes=int(options.max_shard_gb * 1e9),
            force=options.force,
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
