"""`fuserl stats`: figures of a data set."""

import argparse
import json

from fuserl_megatron.cli.options import Jobs, add_command


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "stats",
        run,
        "lengths, rewards, gaps and weights of a data set",
        """examples:
  fuserl stats fused
  fuserl stats fused --json stats.json

Says which row length (data.seq_length) holds how many prompts, how far rewards of one prompt lie apart (what
reward_temperature is compared with), and how the source weights change with it.
""",
    )
    command.add_argument("path", metavar="DATASET", help="directory that `fuserl build` wrote")
    command.add_argument("--json", metavar="FILE", help="also write the figures there")


def run(options: argparse.Namespace) -> int:
    """`fuserl stats`."""
    from fuserl_megatron.data.dataset import FusedDataset
    from fuserl_megatron.records.stats import statistics, tables
    from fuserl_megatron.util.report_page import columns

    found = statistics(FusedDataset(options.path, verify=False))
    for title, rows in tables(found).items():
        print(title, *(f"  {line}" for line in columns(rows)), sep="\n")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    return 0
