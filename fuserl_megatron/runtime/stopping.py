"""Stopping in good order, to be continued: on Ctrl-C, SIGUSR1 or SIGTERM, or before the time of the run is up.

Any rank may be told; all ranks agree at the end of a step (in a reduction that the step makes anyway) or between two
batches of validation and reference scoring, save, and leave with exit code 0 and the file REQUEUE in results_dir, whose
last line is the command that goes on. The next start removes it. A second signal ends the process at once.

Signals are blocked in every thread but one that waits for them, so a process that hangs in a collective still obeys the
second one, and processes started while saving inherit the block: a signal to the whole process group cannot break a
checkpoint. Nothing heavy is imported here: signals are held from the first moment on.
"""

import contextlib
import math
import os
import shlex
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

from fuserl_megatron.config.keys import seconds_of
from fuserl_megatron.util.files import write_file
from fuserl_megatron.util.paths import REQUEUE

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""Held from the first moment of a command on."""
HEARD = (*SIGNALS, signal.SIGINT)
"""What a rank that listens obeys. Until then Ctrl-C ends a rank at once: nothing was done that could be saved."""
SAME_SIGNAL_S = 2.0
"""A launcher and the process group may both hand on one signal: what comes within this time is not a second one."""

MARGIN_S = 5.0
STARTED = time.time()

_received: list[signal.Signals] = []


class Stopped(Exception):
    """Raised by all ranks at the same place: leave, and be continued later."""


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Keep signals waiting until `listen` (in a rank) or the launcher of ranks can deal with them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # an embedding program's affair
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def listen() -> None:
    """From now on signals ask this process to stop. To be called inside `held`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    threading.Thread(target=_listen, name="signals", daemon=True).start()


def release() -> None:
    """From now on signals kill this process, as they do any other. To be called inside `held`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _listen() -> None:
    _received.append(signal.Signals(signal.sigwait(HEARD)))
    since = time.monotonic()
    os.write(2, f"{_received[0].name}: stopping after this step or batch; once more ends at once, unsaved\n".encode())
    while True:
        again = signal.Signals(signal.sigwait(HEARD))
        if time.monotonic() - since > SAME_SIGNAL_S:
            os.write(2, f"{again.name} again: ended at once, nothing saved\n".encode())
            os._exit(128 + again)


class Stopping:
    """Whether a run is to stop now. Every rank has one; `check` is called by all of them at the same time."""

    def __init__(self, device, max_time_per_run: str | None = None, environ: Mapping[str, str] = os.environ):
        """max_time_per_run: DD:HH:MM:SS from the start of this process, or None; the SLURM job's end is in environ."""
        self.device = device
        self.save_s = 0.0
        """Seconds that writing a checkpoint takes, so far as is known."""
        limits = []
        if max_time_per_run is not None:
            name = f"the time limit exp_manager.max_time_per_run={max_time_per_run}"
            limits.append((STARTED + seconds_of(max_time_per_run), name))
        if environ.get("SLURM_JOB_END_TIME", "").isdigit():
            limits.append((float(environ["SLURM_JOB_END_TIME"]), "the end of the SLURM job"))
        self.deadline, self.limit = min(limits, default=(math.inf, ""))
        self._told: str | None = None
        self._units: deque[float] = deque(maxlen=20)
        self._last: float | None = None

    def wanted(self) -> bool:
        """Whether this rank was told to stop, or sees that time runs out. To be called once a step or batch.

        Something is done at every start, or a run with too little time would be continued for ever.
        """
        now = time.time()
        if self._last is not None:
            self._units.append(now - self._last)
        self._last = now
        if _received:
            self._told = _received[0].name
        elif self._units and now + self.needed_s() > self.deadline:
            self._told = self.limit
        return self._told is not None

    def needed_s(self) -> float:
        """Seconds for one more step or batch and for saving: half as long again as usual, and a little."""
        return 1.5 * (statistics.median(self._units) + self.save_s) + MARGIN_S

    def check(self) -> None:
        """Between two batches, or before the first step (one small reduction).

        Raises:
            Stopped: on every rank, if any was told to stop.
        """
        from fuserl_megatron.runtime.collectives import any_rank

        if any_rank(self.wanted(), self.device):
            raise Stopped

    def leave(self, directory: Path, where: str, is_main: bool) -> None:
        """What every rank does after `Stopped`: rank 0 writes REQUEUE and says how to go on.

        A batch script does not know which folder the settings name; FUSERL_MARKER is a file where it looks as well.
        """
        from fuserl_megatron.runtime.collectives import from_all_ranks

        rank, told = next((rank, told) for rank, told in enumerate(from_all_ranks(self._told)) if told)
        if is_main:
            ask_for_more(directory, f"stopped by {told} (rank {rank}) {where}")


def ask_for_more(directory: Path, why: str) -> None:
    """Write REQUEUE with the command that goes on, and say it."""
    directory.mkdir(parents=True, exist_ok=True)
    also = [Path(os.environ["FUSERL_MARKER"])] if os.environ.get("FUSERL_MARKER") else []
    for file in (directory / REQUEUE, *also):
        write_file(file, [f"{why}\n{resume_command()}\n".encode()])
    print(f"{why}; continue with: {resume_command()}", flush=True)


def remove_marker(directory: Path) -> None:
    """At a start, before anything can go wrong: a run that fails now must not look like one to be continued."""
    with contextlib.suppress(FileNotFoundError):
        (directory / REQUEUE).unlink()


def resume_command(environ: Mapping[str, str] = os.environ) -> str:
    """What to type, wherever one is, to continue this run: the command that started it, quoted for a shell.

    FUSERL_COMMAND, which launchers set, has the last word; torchrun and srun are put in front as far as their variables
    tell.
    """
    return f"cd {shlex.quote(os.getcwd())} && {environ.get('FUSERL_COMMAND') or own_command(environ)}"


def own_command(environ: Mapping[str, str] = os.environ) -> str:
    """This process's command line, with torchrun or srun in front where one of them started it."""
    words = ["fuserl", *sys.argv[1:]]
    if "TORCHELASTIC_RUN_ID" in environ:
        nodes, each = environ.get("GROUP_WORLD_SIZE", "1"), environ.get("LOCAL_WORLD_SIZE", "1")
        words[:1] = ["torchrun", f"--nnodes={nodes}", f"--nproc-per-node={each}", "-m", "fuserl_megatron.cli"]
    elif int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        words[:0] = ["srun", f"--ntasks={environ['SLURM_STEP_NUM_TASKS']}"]
    return shlex.join(words)
