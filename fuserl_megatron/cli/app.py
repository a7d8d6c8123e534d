"""`fuserl`: one subcommand per job, each a thin call into a room.

Nothing heavy is imported before a command needs it: `--help`, a misspelt key or a wrong layout answer within a second.
Exit codes: 0 done, 1 a failed check or a crash, 2 something the user can put right (one line), 130 after Ctrl-C,
143 after SIGTERM, 129 after SIGHUP (the terminal is gone). Whatever happens, the end is one line; FUSERL_DEBUG=1 shows
the traceback, too.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fuserl_megatron.cli import commands
from fuserl_megatron.cli.arguments import build_parser as build_parser
from fuserl_megatron.util.credentials import redact
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import one_line, printable, shortened

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
    starts_ranks = hasattr(options, "nproc") or options.run is commands.demo  # those have their own way to stop
    return _exit_code("fuserl", lambda: options.run(options), starts_ranks)


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

    return _exit_code(parser.prog, run)


def _exit_code(program: str, run: Callable[[], int], starts_ranks: bool = False) -> int:
    before = {} if starts_ranks else {number: signal.getsignal(number) for number in STOPS}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # as under nohup
    for number in before:
        signal.signal(number, _stopped)
    try:
        return run()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `fuserl ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("FUSERL_DEBUG", "0") not in ("", "0"):
            raise
        print(f"{program}: error: {message_of(error)}", file=sys.stderr)
        return 2 if isinstance(error, (UserError, OSError)) else 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(number: int, _frame: object) -> None:
    """Unwind, so that nothing half-written stays; once, for a second signal must not cut the clean-up short."""
    for other in STOPS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def message_of(error: Exception) -> str:
    """The message on one line; for an OSError the path first and no errno, for what nobody foresaw its class."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = "out of memory: use a machine with more, or less at once"
    elif isinstance(error, (UserError, OSError)):
        text = one_line(error) or type(error).__name__
    else:
        text = f"{type(error).__name__}: {shortened(one_line(error), 500)} (not foreseen; FUSERL_DEBUG=1 shows where)"
    return redact(printable(text))
