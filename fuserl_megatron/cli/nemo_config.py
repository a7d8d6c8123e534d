"""`fuserl nemo-config`: a NeMo-Aligner file as settings."""

import argparse

from fuserl_megatron.cli.options import Jobs, add_command


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "nemo-config",
        run,
        "a NeMo-Aligner SFT or DPO file -> settings of `fuserl train`",
        """examples:
  fuserl nemo-config gpt_dpo.yaml > mine.yaml
  fuserl train --config-name mine.yaml model.path=models/target data.path=fused_po data.validation_path=heldout

Prints a yaml file; comments above the settings say of every key of the NeMo file whether it is mapped, ignored (and
why) or unsupported. docs/nemo.md has the whole table.
""",
    )
    command.add_argument("file", metavar="FILE", help="NeMo-Aligner's yaml file, with or without its interpolations")


def run(options: argparse.Namespace) -> int:
    """`fuserl nemo-config`."""
    from fuserl_megatron.nemo.settings import convert, report

    print(report(*convert(options.file)), end="")
    return 0
