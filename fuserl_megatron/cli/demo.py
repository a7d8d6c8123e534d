"""`fuserl demo`: the skills experiment."""

import argparse
import subprocess
import sys
from pathlib import Path

from fuserl_megatron.cli.options import Jobs, add_command
from fuserl_megatron.util.errors import UserError


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "demo",
        run,
        "the skills experiment, end to end, on this machine",
        """examples:
  fuserl demo
  fuserl demo --dir /tmp/demo
""",
    )
    command.add_argument("--dir", default="demo", help="directory to write (default: demo)")


def run(options: argparse.Namespace) -> int:
    """`fuserl demo`: the examples are no part of the wheel, so this needs a checkout."""
    checkout = Path(__file__).resolve().parents[2]
    for root in (checkout, Path.cwd()):  # examples/ of the current directory may be another program's
        script = root / "examples" / "skills" / "run_demo.py"
        if script.is_file():
            return subprocess.call([sys.executable, str(script), "--dir", options.dir])
    raise UserError(
        "demo: examples/skills is not here (the wheel carries no examples); clone the repository and type `make demo`."
    )
