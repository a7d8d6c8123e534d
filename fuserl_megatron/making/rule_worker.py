"""The process in which a user's rule runs, one call after the other, within limits. `rules.py` starts it and watches.

It speaks over two pipes: a request is a line of JSON on standard input, an answer a line on standard output. Before
the rule's module is imported both are moved to other numbers, so nothing that the rule reads or prints gets into them.
The rule runs in the main thread (many set an alarm, which works nowhere else). Imports hardly anything: it starts fast.
"""

import contextlib
import ctypes
import errno
import json
import math
import os
import random
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import file_sha256
from fuserl_megatron.util.named import load_named

NEW_USER, NEW_PIDS, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
"""Flags of unshare(2)."""
DIE_WITH_PARENT, TAKE_ORPHANS = 1, 36
"""Options of prctl(2): PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER."""
MAX_TEXT = 300
"""Longest message of an error, in characters."""
MAX_PARTS, MAX_NAME = 64, 100


def main() -> None:
    """Serve requests until the pipe closes. The settings come as JSON in the first argument."""
    settings = json.loads(sys.argv[1])
    requests, answers = os.dup(0), os.fdopen(os.dup(1), "wb", buffering=0)  # dup: not inherited by other programs
    isolation = _isolate(settings["network"])
    output = tempfile.TemporaryFile()  # noqa: SIM115
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.set_blocking(output.fileno(), True)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (settings["output_bytes"],) * 2)  # Python turns the signal into an error

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found).encode() + b"\n")

    try:
        function, about = _load(settings["function"], settings["setting"])
    except UserError as error:
        answer({"refused": str(error)})
        return
    _limit_memory(settings["memory_bytes"])
    answer(isolation | about)
    me = os.getpid()
    for line in os.fdopen(requests, "rb"):
        found = _call(function, json.loads(line), settings["arguments"], me)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        for stream in (1, 2):
            os.lseek(stream, 0, os.SEEK_SET)
        os.ftruncate(1, 0)
        answer(found)


def _call(function: Callable, record: dict[str, Any], arguments: dict[str, Any], me: int) -> dict[str, Any]:
    """One answer. `restart` in it says that this process is spoilt for the next row."""
    random.seed(0)
    try:
        found = _checked(function(record["prompt"], record["response"], record, **arguments))
        spoilt = False
    except MemoryError:
        found, spoilt = {"error": "out of memory: the rule took more than its limit"}, True
    except BaseException as error:  # also sys.exit
        too_much = isinstance(error, OSError) and error.errno == errno.EFBIG
        found = {"error": "printed or wrote more than its limit" if too_much else _words(error)}
        spoilt = too_much
    finally:
        if os.getpid() != me:  # a child that the rule has forked came back here
            os._exit(0)
    return found | ({"restart": True} if spoilt or _has_children() else {})


def _checked(found: Any) -> dict[str, Any]:
    """A number, or names with numbers of which one is called reward."""
    if not isinstance(found, dict):
        return {"value": _number(found, "the rule gave")}
    if "reward" not in found or len(found) > MAX_PARTS or not all(isinstance(k, str) for k in found):
        raise ValueError(f"the rule gave a dictionary without 'reward', or with more than {MAX_PARTS} names")
    parts = {k[:MAX_NAME]: _number(v, f"the rule's {k[:MAX_NAME]!r} is") for k, v in found.items() if k != "reward"}
    return {"value": _number(found["reward"], "the rule's 'reward' is"), "parts": parts}


def _number(found: Any, what: str) -> float:
    try:
        value = float(found) if not isinstance(found, str | bytes) else None
    except (TypeError, ValueError, OverflowError):
        value = None
    if value is None:
        raise ValueError(f"{what} something of type {type(found).__name__}, not a number")
    if not math.isfinite(value):
        raise ValueError(f"{what} {str(found)[:40]}, not a finite number")
    return value


def _words(error: BaseException) -> str:
    """Class and message of what the rule raised, on one line; the message may itself fail."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}"[:MAX_TEXT].rstrip(": ")


def _has_children() -> bool:
    """Whether processes of the rule are left running; finished ones are taken away."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _load(name: str, setting: str) -> tuple[Callable, dict[str, Any]]:
    """The rule, and what identifies its code.

    Raises:
        UserError: it is not there, or no function.
    """
    function = load_named(name, setting)
    if not callable(function):
        raise UserError(f"{setting}={name}: is of type {type(function).__name__}, no function.")
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    sha256 = file_sha256(file) if file else None
    return function, {"file": file, "sha256": sha256}


def _isolate(network: bool) -> dict[str, bool]:
    """Leave the network (unless it is allowed) and the other processes behind, as far as the kernel lets us.

    In a name space of processes of its own, whatever the rule starts dies with it. The process that stays outside waits
    and ends as the inner one does.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    user, group = os.getuid(), os.getgid()
    net = 0 if network else NEW_NETWORK
    for flags in (NEW_PIDS | net, NEW_PIDS | net | NEW_USER, net, net | NEW_USER if net else 0):
        if flags and libc.unshare(flags) == 0:
            break
    else:
        flags = 0
    if flags & NEW_USER:
        for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with contextlib.suppress(OSError), open(f"/proc/self/{file}", "w") as settings:
                settings.write(text)
    if flags & NEW_PIDS and (child := os.fork()):
        for stream in (0, 1):
            os.close(stream)
        os.closerange(3, 64)  # the pipes: their end must be seen when the inner process is gone
        status = os.waitpid(child, 0)[1]
        os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    libc.prctl(TAKE_ORPHANS, 1)
    return {"no_network": bool(flags & NEW_NETWORK), "own_processes": bool(flags & NEW_PIDS)}


def _limit_memory(more: int) -> None:
    """From here on this process may take `more` bytes of address space than its interpreter and imports have."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more,) * 2)


if __name__ == "__main__":
    main()
