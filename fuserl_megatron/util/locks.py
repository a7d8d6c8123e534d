"""One writer per destination: a lock file that says who holds it.

The lock is flock's: the kernel drops it when its holder dies, however it dies, so a lock that was left over is free and
nobody has to judge how old it is. What the file says (host, process, SLURM job) is only for the message. File systems
that share files between nodes also share these locks (NFS, Lustre and GPFS as they are usually mounted); where a
file system knows no locks at all, that is said once and the work goes on without one.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from fuserl_megatron.util.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
SAME_HOST_S = 1.0
"""A check by another process takes the lock for a moment; longer than this it is a writer."""
OTHER_HOST_S = 120.0
"""A server of files may keep the lock of a node that died for about a minute and a half (the lease of NFS version 4):
the job that was put back into the queue must not fail on it."""
POLL_S = 0.1


@contextlib.contextmanager
def only_writer(file: Path, destination: str | Path, advice: str) -> Iterator[None]:
    """Hold the lock `file` while the body writes to `destination`. Folders made for the lock alone go again with it.

    Args:
        file: the lock file: inside a directory that stays, beside one that is replaced as a whole.
        destination: what is written, as the message names it.
        advice: the end of the message: what else to choose.

    Raises:
        UserError: another process holds it, in one line that names the host, the process and the job; or nothing can be
            written there. Nothing changed.
    """
    missing = [folder for folder in (file.parent, *file.parent.parents) if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(file, destination, advice)
    except OSError as error:
        for folder in missing:
            with contextlib.suppress(OSError):  # those that could be made
                folder.rmdir()
        why = "a file is in the way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise UserError(f"{destination}: cannot be created ({why}); {advice}") from None
    try:
        yield
    finally:
        if handle:
            file.unlink(missing_ok=True)  # while it is held: who waits for it sees that the name is gone
            handle.close()
        for folder in missing:
            with contextlib.suppress(OSError):  # something was written there
                folder.rmdir()


def _acquire(file: Path, destination: str | Path, advice: str) -> IO[str] | None:
    started, told = time.monotonic(), False
    while True:
        handle = open(file, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(handle)
            handle.close()
            if error.errno in NO_LOCKS:
                _warn(f"{file.parent}: this file system has no locks: two writers at once would not be noticed")
                return None
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise OSError(error.errno, error.strerror, str(file)) from None
            elsewhere = holder.get("host") not in (None, socket.gethostname())
            limit = OTHER_HOST_S if elsewhere else SAME_HOST_S
            if time.monotonic() - started >= limit:
                raise UserError(f"{destination}: {_named(holder)} writes there: wait, stop it, or {advice}") from None
            if elsewhere and not told:
                told = _warn(f"{destination}: {_named(holder)} writes there; waiting up to {OTHER_HOST_S:g} s for it")
            time.sleep(POLL_S)
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.stat(file).st_ino == os.fstat(handle.fileno()).st_ino:
                with contextlib.suppress(OSError):  # a full disk: the lock holds without saying whose it is
                    os.ftruncate(handle.fileno(), 0)
                    os.write(handle.fileno(), json.dumps(_myself()).encode() + b"\n")
                return handle
        handle.close()  # the one who held it has removed the name meanwhile: once more, with the new file


def _myself(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    job = environ.get("SLURM_JOB_ID")
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since} | ({"job": job} if job else {})


def _holder(handle: IO[str]) -> dict[str, Any]:
    """What the lock file says; nothing while its holder is about to write it."""
    handle.seek(0)
    try:
        found = json.loads(handle.read(4096))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _named(holder: Mapping[str, Any]) -> str:
    """Process 4711 on node7, SLURM job 12, since 2026-01-31 08:00:00."""
    if not holder:
        return "another process"
    job = f", SLURM job {holder['job']}" if "job" in holder else ""
    return ascii(f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')},")[1:-1]


def _warn(text: str) -> bool:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
    return True
