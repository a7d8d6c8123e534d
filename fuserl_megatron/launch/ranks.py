"""Ranks on this machine: `fuserl train --nproc 4` starts four processes of itself and watches over them.

The environment each rank gets is torchrun's (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), so the same entry
runs under torchrun and srun. torchrun itself is not used here: its agent imports torch a further time (seconds, and
memory), answers every failure with exit code 1, and prints a traceback of its own over a one-line user error.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.machine import usable_cores
from fuserl_megatron.util.ports import reserved_port

USER_ERROR = 2
UNSET = "torchrun and srun set these variables together; to start ranks here, unset them and type --nproc N."
OTHERS_MAY_REPORT_S = 2.0
"""After the first rank failed, seconds for the others to end by themselves: most user errors are met by all ranks."""
HELD_LINES, HELD_S = 500, 30.0
"""A traceback is held back until the rank has ended, or goes on for this many lines or seconds: it is no last word."""
POLL_S = 0.05
ERROR_PREFIX, TRACEBACK = "fuserl: error:", "Traceback (most recent call last)"


def is_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one rank: torchrun, this module, or an srun of several tasks.

    Raises:
        UserError: a variable that gives a rank or a number of ranks is missing beside the others, or is no such number.
    """
    if "RANK" not in environ:
        if "SLURM_STEP_NUM_TASKS" not in environ or _count(environ, "SLURM_STEP_NUM_TASKS") == 1:
            return False
    rank, world = ("RANK", "WORLD_SIZE") if "RANK" in environ else ("SLURM_PROCID", "SLURM_NTASKS")
    if (place := _count(environ, rank, least=0)) >= (number := _count(environ, world)):
        raise UserError(f"{rank}={place} with {world}={number}: ranks count from 0; {UNSET}")
    for name, least in (("LOCAL_RANK", 0), ("SLURM_LOCALID", 0), ("LOCAL_WORLD_SIZE", 1), ("MASTER_PORT", 1)):
        if name in environ:
            _count(environ, name, least)
    return True


def launched_world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Ranks over all nodes, as the launcher that started this one says."""
    return _count(environ, "WORLD_SIZE" if "RANK" in environ else "SLURM_STEP_NUM_TASKS")


def _count(environ: Mapping[str, str], name: str, least: int = 1) -> int:
    text = environ.get(name)
    if text is None:
        known = "RANK" if "RANK" in environ else "SLURM_STEP_NUM_TASKS"
        raise UserError(f"{known} is set and {name} is not: {UNSET}")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise UserError(f"{name}={ascii(text)[1:-1]}: must be a whole number, at least {least}; {UNSET}")
    return int(text)


def rank_environment(rank: int, num_ranks: int, port: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a rank on this machine needs to find the others. Values the user already chose are kept."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // num_ranks)),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # core's order of communication and computation relies on it
    }
    if any(name == "lo" for _, name in socket.if_nameindex()):
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # gloo would otherwise look up the host name, which may not resolve
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }
    return {**defaults, **environ, **address, **place}


def run_ranks(
    command: Sequence[str], num_ranks: int, environ: Mapping[str, str] = os.environ, *, save_on_ctrl_c: bool = False
) -> int:
    """Run one process per rank until all have ended.

    Rank 0 has this terminal. What the other ranks print goes to standard error, marked with the rank; a user error that
    rank 0 reports as well is not repeated. When a rank fails, all are killed. SIGTERM and SIGUSR1 are passed on, and it
    is the ranks' affair what they do then and how long it takes: saving a checkpoint, in training. With save_on_ctrl_c
    the same holds for SIGINT; without it Ctrl-C ends the ranks.

    Returns:
        0, or the exit code of the rank that failed first (128 + signal number for a killed one, 130 after Ctrl-C).
    """
    reserved = reserved_port()
    port = reserved.getsockname()[1]
    group = _Group()
    signals = (signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if save_on_ctrl_c else []))
    forwarded = {sig: signal.signal(sig, group.forward) for sig in signals}
    try:
        for rank in range(num_ranks):
            group.start(rank, command, rank_environment(rank, num_ranks, port, environ))
        # ranks inherit a block of the caller's, and lift it when they can listen: what came meanwhile reaches them, too
        signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
        return group.watch()
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C: no more waiting
            group.wait(OTHERS_MAY_REPORT_S)  # the terminal has told the ranks as well
        return 130
    finally:
        group.end()
        reserved.close()
        for sig, handler in forwarded.items():
            signal.signal(sig, handler)


class _Group:
    """The processes of one run, in rank order."""

    def __init__(self) -> None:
        self.ranks: list[subprocess.Popen] = []
        self.pumps: list[threading.Thread] = []
        self.last_words: dict[int, list[str]] = {}
        """Of the ranks but 0, from the first error or traceback on; noise when another rank met a user error."""

    def start(self, rank: int, command: Sequence[str], environ: dict[str, str]) -> None:
        stdio: dict[str, Any] = {}
        if rank:
            stdio = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            command, env=environ, text=True, errors="replace", preexec_fn=die_with_parent, **stdio
        )
        self.ranks.append(process)
        if rank:
            self.pumps.append(threading.Thread(target=self._pump, args=(rank, process), daemon=True))
            self.pumps[-1].start()

    def _pump(self, rank: int, process: subprocess.Popen) -> None:
        held, since = self.last_words, 0.0
        for line in process.stdout or ():
            if rank not in held and (line.startswith(ERROR_PREFIX) or TRACEBACK in line):
                held[rank], since = [], time.monotonic()
            words = [line.rstrip()]
            if rank in held:
                held[rank] += words
                dying = len(held[rank]) < HELD_LINES and time.monotonic() - since < HELD_S
                words = [] if dying else held.pop(rank)
            for word in words:
                print(f"[rank {rank}] {word}", file=sys.stderr, flush=True)

    def forward(self, signal_number: int, _frame: object) -> None:
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(signal_number)

    def watch(self) -> int:
        """Wait for all ranks or for the first failure; report it; return the exit code."""
        while True:
            codes = [process.poll() for process in self.ranks]
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:
                break
            if None not in codes:
                self.end()
                self._print_last_words()
                return 0
            time.sleep(POLL_S)
        self.wait(OTHERS_MAY_REPORT_S)
        # a rank that meets a user error leaves the others with broken connections, and they may be gone before it is
        refused = [rank for rank, process in enumerate(self.ranks) if process.poll() == USER_ERROR]
        first = refused[0] if refused else failed[0]
        self.end()
        if refused:
            errors = [line for line in self.last_words.get(first, []) if line.startswith(ERROR_PREFIX)]
            if first:  # rank 0 has spoken for itself
                print(*errors or [f"{ERROR_PREFIX} rank {first} ended with exit code 2"], sep="\n", file=sys.stderr)
            return USER_ERROR
        self._print_last_words()
        code = codes[first] or 0
        if first == 0 and code == 1 and not any(process.returncode for process in self.ranks[1:]):
            return code  # a check that came out negative: rank 0 has said so, and the others were done
        print(f"{ERROR_PREFIX} rank {first} ended first, {_cause(code)}; the other ranks were ended.", file=sys.stderr)
        return code if code > 0 else 128 - code

    def _print_last_words(self) -> None:
        for rank, lines in sorted(self.last_words.items()):
            for line in lines:
                print(f"[rank {rank}] {line}", file=sys.stderr)

    def wait(self, seconds: float) -> None:
        """Until all ranks have ended, but not longer than so many seconds."""
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.ranks) and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def end(self) -> None:
        """Kill what still runs: asked to stop in order it would wait for ranks that are gone."""
        for process in self.ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
        for pump in self.pumps:
            pump.join(timeout=1.0)


def _cause(code: int) -> str:
    if code > 0:
        return f"with exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def die_with_parent() -> None:
    """In a child, before it becomes its program: ask Linux to kill it when the launcher is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
