"""Signs of life: the file heartbeat.json, one log a rank, and a watchdog that ends a run which hangs.

    results_dir/heartbeat.json    {"step": 120, "time": 1790000000.0}, by rank 0, by rename, once a second at most
    results_dir/logs/rank_3.log   what rank 3 says (rank 0 has the terminal), and any rank's stacks when it hangs

A rank that waits in a collective sits in C code, so the watchdog is a thread of its own: after so many minutes without
a step it writes the stacks of all threads and ends the process. Where even Python's lock is held, a process of its own
(guardian.py) does the same a little later. Both count the time in which they ran, not the clock: a run that was
suspended and goes on is not hung.
"""

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from fuserl_megatron.runtime import guardian
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.own_rank import own_rank

HUNG = 3
"""Exit code."""
OTHERS_MAY_DUMP_S = 5.0
"""Ranks notice a hang at nearly the same time; the first one to end takes the others' connections away."""


def log_path(directory: Path, rank: int) -> Path:
    """The log of one rank."""
    return directory / "logs" / f"rank_{rank}.log"


class Watchdog:
    """Watches one rank from its making to `close`. `tick` is cheap: call it for every step and batch."""

    def __init__(self, minutes: float, directory: Path, rank: int, start_minutes: float = 0.0):
        """minutes: from step to step, 0 watches nothing; start_minutes: between two ticks before the first step.

        The heartbeat is written in any case.
        """
        self.limit_s, self.directory, self.rank = 60 * minutes, directory, rank
        self._start_limit_s = max(self.limit_s, 60 * start_minutes)
        self._step: int | None = None
        self._last, self._beat = time.monotonic(), 0.0
        self._closed = threading.Event()
        self._file: IO[str] | None = None
        self._guardian: subprocess.Popen | None = None
        if self.limit_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def tick(self, step: int | None = None) -> None:
        """Something was done: a batch, a save, a step (how many are done now; from the first such call on the log and
        the guardian are there)."""
        self._last = time.monotonic()
        if step is not None:
            self._step = step
            if self._last - self._beat >= 1.0:
                self._write_heartbeat()
        if self.limit_s and self._step is not None and self._guardian is None:
            self._guardian = self._start_guardian()

    def _start_guardian(self) -> subprocess.Popen:
        faulthandler.register(signal.SIGUSR2, file=self._log(), all_threads=True)
        late = self.limit_s + 4 * OTHERS_MAY_DUMP_S
        command = [sys.executable, "-S", "-E", guardian.__file__, str(os.getpid()), str(late)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)

    def _log(self) -> IO[str]:
        if self._file is None:
            path = log_path(self.directory, self.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        return self._file

    def _write_heartbeat(self) -> None:
        if self.rank == 0 and self._step is not None:
            self._beat, partial = self._last, self.directory / ".heartbeat.partial"
            with contextlib.suppress(OSError):  # a full disk ends no run; the file's age tells
                partial.write_text(json.dumps({"step": self._step, "time": time.time()}) + "\n", encoding="utf-8")
                partial.replace(self.directory / "heartbeat.json")

    def _limit(self) -> float:
        return self._start_limit_s if self._step is None else self.limit_s

    def _watch(self) -> None:
        slice_s, seen, idle = min(1.0, self.limit_s / 20), self._last, 0.0
        while not self._closed.wait(slice_s):
            if self._guardian is not None and self._guardian.stdin is not None:
                with contextlib.suppress(OSError):  # killed
                    self._guardian.stdin.write(b".")
            idle = idle + slice_s if seen == self._last else 0.0
            seen = self._last
            if idle >= self._limit():
                self._end()

    def _end(self) -> None:
        seen, limit = self._last, self._limit()
        idle = f"no step for {limit / 60:g} minutes after step {self._step}"
        if self._step is None:
            idle = f"nothing done for {limit / 60:g} minutes before the first step"
        what = f"rank {self.rank}: {idle}"
        file = self._log()
        file.write(f"\n{what}\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
        line = (
            f"fuserl: error: {what} (trainer.hang_timeout_minutes): ended. The stacks of all ranks are in "
            f"{self.directory / 'logs'}: look for the one that is not in a collective. The same command goes on from "
            "the last checkpoint.\n"
        )
        os.write(2, line.encode())
        if not self._closed.wait(OTHERS_MAY_DUMP_S) and seen == self._last:
            os._exit(HUNG)

    def close(self) -> None:
        """No more watching."""
        self._closed.set()
        self._write_heartbeat()
        if self._guardian and self._guardian.stdin:
            faulthandler.unregister(signal.SIGUSR2)
            self._guardian.stdin.close()
            self._guardian.wait()


@contextlib.contextmanager
def own_log(directory: Path, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Send what ranks but 0 write to their own files; an error that ends one is seen on the terminal, too.

    Where nobody foresaw it, rank 0's terminal shows one line and its log has the traceback.
    """
    rank = own_rank(environ)
    path = log_path(directory, rank)
    if rank == 0:
        try:
            yield
        except Exception as error:
            if not isinstance(error, (UserError, OSError)):
                with contextlib.suppress(OSError):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                        traceback.print_exc(file=file)
            raise
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    before = [os.dup(number) for number in (1, 2)]
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for number in (1, 2):
            os.dup2(handle, number)
        print(f"--- rank {rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
        yield
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in zip((1, 2), before, strict=True):
            os.dup2(kept, number)
            os.close(kept)
        os.close(handle)
