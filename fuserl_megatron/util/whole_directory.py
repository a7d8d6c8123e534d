"""Directories that are either complete or not there.

Everything is prepared in a hidden directory beside the destination (same file system), flushed to the device and
renamed at the very end. On any error the hidden directory goes; an older destination stays as it was. From the making
of the hidden directory to its end the destination is locked (`locks.py`): a second writer is refused, and what a killed
one left behind can be told from what is being written.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import sync_path
from fuserl_megatron.util.locks import only_writer

SLACK_BYTES = 2**20  # headers, index, directory entries

_locks: dict[Path, ExitStack] = {}
"""The lock of each hidden directory this process has not published or discarded yet."""


def check_destination(target: Path, source_dir: str | Path | None, force: bool) -> None:
    """Refuse a destination that is a file or mount point, is not empty (without `force`), or holds the source or us.

    Raises:
        UserError: one line.
    """
    if source_dir is not None:
        source = Path(os.path.realpath(source_dir))
        if target == source or target in source.parents:
            raise UserError(
                f"{target}: replacing it would remove the model it is made from; choose another destination"
            )
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: a file is in the way; choose a directory")
    if os.path.ismount(target):
        raise UserError(f"{target}: a mount point, which cannot be renamed; choose a directory in it")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise UserError(f"{target}: not empty; choose another destination or replace it with --force")
        if target in (here := Path.cwd(), *here.parents):  # also what an unset shell variable leads to
            raise UserError(
                f"{target}: holds the current directory, which would be removed; choose another destination"
            )


def create_partial(target: Path, needed_bytes: int | None, *, source_dir: str | Path | None, force: bool) -> Path:
    """Make the hidden directory beside the target, after `check_destination` and a look at the free space.

    needed_bytes is what will be written; None where nobody knows: then the free space is not looked at.
    The target is locked until `publish` or `discard` is called with what this returns.

    Raises:
        UserError: somebody else writes there, not enough space, or the place cannot be written.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    with ExitStack() as stack:
        try:
            advice = "choose another destination"
            stack.enter_context(only_writer(target.with_name(f".{target.name}.lock"), target, advice))
            _remove_leftovers(target)
            check_destination(target, source_dir, force)
            if needed_bytes is not None:
                needed, free = needed_bytes + SLACK_BYTES, shutil.disk_usage(target.parent).free
                if free < needed:
                    raise UserError(
                        f"{target}: needs {size(needed)} but its disk has {size(free)} free; "
                        "free space or choose another destination"
                    )
            partial.mkdir()
        except OSError as error:
            raise cannot_write(target, error, "created") from None
        _locks[partial] = stack.pop_all()
    return partial


def _remove_leftovers(target: Path) -> None:
    """What killed writers left, with the lock held. An older target that was moved aside last is put back first."""
    name = glob.escape(target.name)
    replaced = sorted(target.parent.glob(f".{name}.replaced-*"), key=lambda path: path.stat().st_mtime)
    if replaced and not target.exists():
        os.rename(replaced.pop(), target)
    for left in [*replaced, *target.parent.glob(f".{name}.partial-*")]:
        shutil.rmtree(left, ignore_errors=True)


def publish(partial: Path, target: Path) -> None:
    """Flush everything below `partial` to the device, rename it to `target`, moving an older target aside, and unlock.

    Raises:
        UserError: the file system refused; the older target is back in its place, or only its remains are in the way.
    """
    aside = target.with_name(f".{target.name}.replaced-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        for file in [*partial.rglob("*"), partial]:
            sync_path(file)
        try:
            if target.exists():
                os.rename(target, aside)
            os.rename(partial, target)
        finally:
            if aside.exists() and not target.exists():
                os.rename(aside, target)
        sync_path(target.parent)
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        if aside.exists():
            shutil.rmtree(aside)
    except OSError as error:
        raise UserError(
            f"{target}: written, but what it replaces cannot be removed ({error.strerror}); remove {aside}"
        ) from error
    _unlock(partial)


def discard(partial: Path) -> None:
    """Remove an unfinished directory and give up its lock. Safe to call when it is already gone."""
    shutil.rmtree(partial, ignore_errors=True)
    _unlock(partial)


def _unlock(partial: Path) -> None:
    if partial in _locks:
        _locks.pop(partial).close()


@contextmanager
def whole_directory(
    destination: str | Path, *, needed_bytes: int, source_dir: str | Path | None, force: bool
) -> Iterator[Path]:
    """The steps above for one process: yields the hidden directory; publishes it when the body ends, else removes it.

    Args:
        destination: where the directory shall be.
        needed_bytes: what will be written; compared with the free space.
        source_dir: what the destination must not replace; None for nothing.
        force: replace a non-empty destination.

    Raises:
        UserError: one line, also for what the file system refuses in the body.
    """
    target = Path(os.path.realpath(destination))
    partial = create_partial(target, needed_bytes, source_dir=source_dir, force=force)
    try:
        yield partial
        publish(partial, target)
    except BaseException as error:  # also Ctrl-C: nothing that looks finished may stay
        discard(partial)
        if isinstance(error, OSError):
            raise cannot_write(target, error) from error
        raise


def size(num_bytes: int) -> str:
    """Bytes in the decimal unit that fits: 1.31 MB, 16.07 GB."""
    exponent = next((e for e in (9, 6, 3) if num_bytes >= 10**e), 3)
    return f"{num_bytes / 10**exponent:.2f} {({3: 'kB', 6: 'MB', 9: 'GB'})[exponent]}"


def cannot_write(target: Path, error: OSError, what: str = "written") -> UserError:
    """One line for what the file system refused."""
    return UserError(f"{target}: cannot be {what} ({error.strerror or error}); choose another destination")
