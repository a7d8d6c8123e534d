"""The process that ends a rank whose own watchdog cannot, because a call into C keeps Python's lock for ever.

Run as a script: `guardian.py PID SECONDS`. Standard input brings a byte at every sign of life and ends with the rank.
So long without one, the rank is told to write its stacks (SIGUSR2, which faulthandler answers without Python's lock)
and is killed. Time in which the rank was stopped (Ctrl-Z, `scontrol suspend`) or this process was does not count.
Nothing of ours is imported: it starts in milliseconds and takes a few megabytes.
"""

import os
import select
import signal
import sys
import time

STACKS_S = 1.0


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process; False where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def watch(pid: int, limit_s: float) -> None:
    """Return when standard input ends; end the process after limit_s seconds without a byte."""
    slice_s, silent = min(1.0, limit_s / 20), 0.0
    while silent < limit_s:
        if select.select([0], [], [], slice_s)[0]:
            if not os.read(0, 4096):
                return
            silent = 0.0
        elif not is_stopped(pid):
            silent += slice_s
    os.kill(pid, signal.SIGUSR2)
    time.sleep(STACKS_S)
    os.write(2, b"fuserl: error: a rank and its watchdog gave no sign of life: killed; its stacks are in its log\n")
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    watch(int(sys.argv[1]), float(sys.argv[2]))
