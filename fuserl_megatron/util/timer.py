"""Seconds of the parts of a step: the wall clock on a CPU, CUDA events on a GPU, read once a step.

`gradient_sync` is core's `finalize_model_grads`: what of the gradients' reduction over ranks was not hidden behind the
backward pass, with the waiting for slower ranks. That is the communication that can be told apart from outside.
Collectives inside the layers (tensor and context parallel), the pipeline's sends and its bubble, and the gathering of
weights belong to forward_backward: only a trace shows them (exp_manager.profile_steps).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Adds up the seconds of named parts until it is read."""

    def __init__(self):
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what runs inside under this name; also a decorator of functions."""
        begin = _now()
        yield
        self._spans.append((name, begin, _now()))

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading; waits for the device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spans, self._spans = self._spans, []
        seconds: dict[str, float] = {}
        for name, begin, end in spans:
            taken = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
            seconds[name] = seconds.get(name, 0.0) + taken
        return seconds


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
