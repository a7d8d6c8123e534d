"""A tensor's bytes to and from a place of a file."""

import os
from typing import BinaryIO

import torch

WINDOW_BYTES = 3 * 2**19
"""What is read and converted at a time: small enough for the processor's cache."""
PIECE_BYTES = 3 * 2**17
"""What one call writes: larger ones make Linux look for large folios, which it may not have (docs/conversion.md)."""


def read_into(file: BinaryIO, offset: int, out: torch.Tensor) -> bool:
    """Fill a contiguous tensor with a file's bytes from `offset` on; False when the file ends before."""
    view, done = out.view(-1).view(torch.uint8).numpy().data, 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done : done + 2**30]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def write_at(handle: int, offset: int, window: torch.Tensor) -> None:
    """Write a contiguous tensor's bytes at a place of an open file, and let the device take them at once.

    Without the hint all of them would wait for the closing fsync. The kernel then also forgets them, so that a large
    model does not push everything else out of the page cache.
    """
    view = window.view(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        begun = done
        while done < min(len(view), begun + WINDOW_BYTES):
            done += os.pwrite(handle, view[done : done + PIECE_BYTES], offset + done)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, offset + begun, done - begun, os.POSIX_FADV_DONTNEED)
