"""`fuserl report`: a page with pictures of one or several runs."""

import argparse
import time
from pathlib import Path

from fuserl_megatron.cli.options import Jobs, add_command
from fuserl_megatron.util.errors import UserError


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "report",
        run,
        "a page with the pictures of one or several runs",
        """examples:
  fuserl report runs/fusesft
  fuserl report runs/fusesft runs/fusepo --output compared.html

RUN is the run.results_dir of a training or evaluation. The page needs no network: curves, held-out figures before and
after, the data's sources, and which settings differ. A training writes its own, report.html, at its end; --watch writes
it again while the run goes on.
""",
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="run.results_dir of a run")
    command.add_argument("--output", metavar="FILE", help="page to write (default: report.html in the first RUN)")
    command.add_argument("--watch", type=float, metavar="SECONDS", help="write it again so often, until Ctrl-C")


def run(options: argparse.Namespace) -> int:
    """`fuserl report`."""
    from fuserl_megatron.metrics.report import FILE, write_report

    if options.watch is not None and not options.watch >= 1:
        raise UserError(f"--watch {options.watch}: must be at least 1 second.")
    output = Path(options.output or Path(options.runs[0], FILE))
    write_report(options.runs, output, options.watch)
    print(f"written: {output}", flush=True)
    while options.watch is not None:
        time.sleep(options.watch)
        write_report(options.runs, output, options.watch)
    return 0
