"""Copying a model's numbers from files to files: small windows of rows, parts of the model side by side."""

import math
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from fuserl_megatron.convert.hf_config import ModelShape
from fuserl_megatron.convert.names import hf_names, hf_shapes, megatron_names
from fuserl_megatron.util.machine import usable_cores
from fuserl_megatron.util.tensor_io import WINDOW_BYTES

MAX_THREADS = 4
"""That copy side by side; more would only wait for the device."""
_Done = TypeVar("_Done")


class Window:
    """One small memory through which all rows pass; one for each parameter would leave holes all over the heap."""

    def __init__(self, stop: threading.Event):
        self._memory, self._stop = torch.empty(WINDOW_BYTES, dtype=torch.uint8), stop

    def pieces(self, count: int, rest: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """`count` rows of shape `rest` piece by piece: (first row, memory [rows, *rest] for them)."""
        row_bytes = max(1, math.prod(rest) * dtype.itemsize)
        if row_bytes > len(self._memory):
            self._memory = torch.empty(row_bytes, dtype=torch.uint8)
        step = len(self._memory) // row_bytes
        for row in range(0, count, step):
            if self._stop.is_set():
                raise RuntimeError("another part failed, or the user stopped the conversion")
            rows = min(step, count - row)
            yield row, self._memory[: rows * row_bytes].view(dtype).view(rows, *rest)


def all_finite(numbers: torch.Tensor) -> bool:
    """Whether no float is NaN or infinite; of a window in the processor's cache 3 to 6 GB a second."""
    if not numbers.is_floating_point() or numbers.itemsize < 2 or not numbers.numel():
        return True
    return all(math.isfinite(end) for end in torch.aminmax(numbers))  # NaN is both ends


def warn_of(not_finite: set[str], where: object) -> None:
    """A line on stderr for weights that were copied as they are, though no model works with them."""
    if not_finite:
        count = f"{len(not_finite)} tensors hold" if len(not_finite) > 1 else "a tensor holds"
        print(f"WARNING: {where}: {count} NaN or infinity: {', '.join(sorted(not_finite)[:3])}", file=sys.stderr)


def in_parts(
    shape: ModelShape, work: Callable[[int, list[str], Window], _Done], threads: int = MAX_THREADS
) -> list[_Done]:
    """Share a model's parameters out to threads, in parts of about equal size that lie together in the files.

    Reading and writing leave the interpreter free, and a thread alone mostly waits for the kernel to copy.

    Args:
        shape: the model.
        work: takes the part's number, its parameters' Megatron names and a window to pass them through.
        threads: at most so many, and at most one a core that this process may use.

    Returns:
        What `work` returned, part by part. The first error in any of them stops the others and is raised.
    """
    parts: list[list[str]] = [[] for _ in range(min(threads, usable_cores()))]
    before = 0
    shapes = hf_shapes(shape)
    sizes = {name: sum(math.prod(shapes[hf]) for hf in hf_names(name, shape)) for name in megatron_names(shape)}
    total = sum(sizes.values())
    for name, numbers in sizes.items():
        parts[(2 * before + numbers) * len(parts) // (2 * total)].append(name)
        before += numbers
    stop = threading.Event()
    with ThreadPoolExecutor(len(parts)) as pool:
        try:
            jobs = [pool.submit(work, number, names, Window(stop)) for number, names in enumerate(parts)]
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()
        finally:
            stop.set()
    return [job.result() for job in jobs]
