"""`fuserl`: one subcommand per job, each a thin call into a room.

Nothing heavy is imported before a command needs it: `--help`, a misspelt key or a wrong layout answer within a second.
Exit codes: 0 done, 1 a failed check or a crash, 2 something the user can put right (one line), 130 after Ctrl-C,
143 after SIGTERM, 129 after SIGHUP (the terminal is gone). Whatever happens, the end is one line; FUSERL_DEBUG=1 shows
the traceback, too.
"""

import argparse
import sys
from collections.abc import Sequence

from fuserl_megatron import __version__
from fuserl_megatron.cli import (
    build,
    convert,
    demo,
    doctor,
    evaluate,
    generate,
    keys,
    launch,
    logprobs,
    nemo_config,
    parity,
    plan,
    report,
    sample,
    score,
    show,
    stats,
    train,
    verify,
)
from fuserl_megatron.cli.exit_codes import exit_code

COMMANDS = (
    sample,
    logprobs,
    score,
    build,
    show,
    stats,
    plan,
    train,
    nemo_config,
    launch,
    evaluate,
    generate,
    report,
    parity,
    convert,
    verify,
    keys,
    doctor,
    demo,
)
"""In the order of `fuserl --help`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a batch system's may be ASCII: a name in a summary must not end a command
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:  # only overrides may stand after further options
        options.subparser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    starts_ranks = hasattr(options, "nproc") or options.run is demo.run  # those have their own way to stop
    return exit_code("fuserl", lambda: options.run(options), starts_ranks)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; every subcommand's namespace carries `run`, the function that does it."""
    parser = argparse.ArgumentParser(
        prog="fuserl",
        description="Fuse several strong language models into one smaller target: FuseRL on Megatron-core.",
        epilog="""examples:
  fuserl doctor
  fuserl build inputs=[scored.jsonl] output=fused tokenizer=models/target reward_temperature=0.01
  fuserl train --nproc 8 recipe=llama31_8b_fusesft model.path=models/target data.path=fused
  fuserl COMMAND --help

A mistake in the settings or files ends with one line; FUSERL_DEBUG=1 in the environment shows the traceback instead.
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fuserl {__version__}")
    jobs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(jobs)
    return parser
