"""How a command ends: its exit code, one line for whatever went wrong, and clean-up before a signal takes effect."""

import os
import signal
import sys
from collections.abc import Callable

from fuserl_megatron.util.credentials import redact
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import one_line, printable, shortened

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def exit_code(program: str, run: Callable[[], int], starts_ranks: bool = False) -> int:
    """Run a command of that name; those that start ranks have their own way to stop."""
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
