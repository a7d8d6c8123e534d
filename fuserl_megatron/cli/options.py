"""What the files of the commands share: how a command is described, and the options of those that take settings.

A command's file has `add`, which describes it, and `run`, which does it and returns the exit code. Rooms are imported
inside the functions, after everything that can be checked without them, so that `fuserl --help` loads nothing heavy.
"""

import argparse
from collections.abc import Callable
from typing import TypeAlias

Jobs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

OVERRIDES = """
Settings are hydra overrides, key=value: any key of fuserl_megatron/config/schema.py, and the groups of conf/
(objective=..., model=..., trainer=..., optim=..., recipe=...). A list is written key=[a,b]; text with spaces, commas
or equal signs goes in quotes: 'run.name="a, b"'.
"""


def add_command(
    jobs: Jobs, name: str, run: Callable[[argparse.Namespace], int] | None, summary: str, epilog: str
) -> argparse.ArgumentParser:
    """A subcommand whose namespace carries `run`; the summary begins its help, the epilog (examples) ends it."""
    command = jobs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ("" if summary.endswith("?") else "."),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run, subparser=command)
    return command


def add_config_options(command: argparse.ArgumentParser, root: str, ranks: bool = False) -> None:
    """The overrides and where the configuration is (root `root` by default); with `ranks` also --nproc."""
    if ranks:
        default = "(default: TP x PP x CP)"
        command.add_argument("--nproc", type=int, metavar="N", help=f"ranks to start on this machine {default}")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, see below")
    command.add_argument(
        "--config-name", metavar="X", help=f"root file, without .yaml, or a yaml file's path (default {root})"
    )
    command.add_argument(
        "--config-dir", metavar="D", help="your own directory of yaml files, searched before the shipped ones"
    )
