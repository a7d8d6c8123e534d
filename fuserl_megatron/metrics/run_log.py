"""What a run says: one line a step, metrics.jsonl, TensorBoard and other trackers, a progress bar where a person
watches. Rank 0 alone speaks."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuserl_megatron.config.schema import Config
from fuserl_megatron.metrics.run_files import METRICS
from fuserl_megatron.metrics.trackers import Trackers
from fuserl_megatron.util.files import write_file
from fuserl_megatron.util.text import printable

SHOWN = {
    "fusesft": [("nll_per_token", "nll/tok")],
    "fusepo": [("accuracy", "acc"), ("margin", "margin")],
}


def say(text: str, aloud: bool = True) -> None:
    """One line on stdout, at once; `aloud` is False on ranks that are to keep silent."""
    if aloud:
        print(printable(text, keep="\n"), flush=True)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def peak_memory_gb() -> float:
    """Peak memory of this process: of the GPU where there is one, otherwise resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def cut_back(path: Path, step: int) -> None:
    """Leave the records of the steps up to this one: the run goes on from here, and what it did later is done again.

    Whole lines only (the last one may have been cut off by a kill), and replaced by rename.
    """
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if step and path.exists() else []:
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except (ValueError, TypeError, LookupError, RecursionError):  # no JSON, or no record
            continue
    write_file(path, [f"{line}\n".encode() for line in kept])


class Lines:
    """Records appended to a JSONL file. What a full disk does not take waits in memory: a run does not end for its log,
    and a checkpoint that failed for the same reason soon gives its room back."""

    def __init__(self, path: Path, warn: Callable[[str], None] = say):
        self.path, self._warn, self._waiting, self._warned = path, warn, b"", False
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (unbuffered: it says how much was taken)

    def add(self, record: dict) -> None:
        """Append one record, at once where there is room."""
        self._waiting += json.dumps(record).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                self._warn(f"WARNING: {self.path}: {error.strerror}: its lines wait in memory until there is room")
            self._warned = True

    def close(self) -> None:
        """Try once more, and say what is lost."""
        with contextlib.suppress(OSError):
            self._write()
        if self._waiting:
            self._warn(f"WARNING: {self.path}: no room for its last {self._waiting.count(10)} lines")
        self._file.close()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]


class RunLog:
    """Log of one run; does nothing on ranks other than 0."""

    def __init__(self, config: Config, directory: Path, total: int, first_step: int, active: bool):
        self.config, self.total, self.first, self.active = config, total, first_step, active
        self.started = time.monotonic()
        self._bar: Any = None
        self._file: Lines | None = None
        self._trackers: Trackers | None = None
        if not active:
            return
        directory.mkdir(parents=True, exist_ok=True)
        cut_back(directory / METRICS, first_step)
        self._file = Lines(directory / METRICS, self._print)
        self._trackers = Trackers(config, directory, first_step, self._print)
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            name = TextColumn("{task.description}", markup=False)
            self._bar = Progress(name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
            self._task = self._bar.add_task(printable(config.run.name), total=total, completed=first_step)
            self._bar.start()

    def step(self, record: dict) -> None:
        """Log one step. The record has step (from 1), loss, grad_norm, lr, seconds, rates, metrics and more."""
        if self._file is None or self._trackers is None:
            return
        record = record | {"memory_gb": round(peak_memory_gb(), 3)}
        finite = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in record.items()}
        self._file.add(finite)
        self._trackers.log(finite, record["step"])
        if record["step"] % self.config.trainer.log_every_n_steps == 0 or record["step"] == self.total:
            self._print(self._line(record))
        if self._bar:
            self._bar.update(self._task, completed=record["step"])

    def validation(self, step: int, metrics: dict) -> None:
        """Log one validation, after `step` steps; metrics are named val_*."""
        shown = [
            f"{label} {metrics[f'val_{name}']:8.4f}"
            for name, label in SHOWN[self.config.objective.stage]
            if f"val_{name}" in metrics
        ]
        parts = [f"validation after step {step}", f"loss {metrics['val_loss']:9.5f}", *shown]
        self._print(" | ".join([*parts, f"{metrics['val_prompts']} prompts"]))
        if self._trackers is not None:
            self._trackers.log(metrics, step)

    def _line(self, record: dict) -> str:
        done = record["step"] - self.first
        eta = (time.monotonic() - self.started) / done * (self.total - record["step"])
        width = len(str(self.total))
        shown = [f"{label} {record[name]:8.4f}" for name, label in SHOWN[self.config.objective.stage] if name in record]
        parts = [
            f"step {record['step']:{width}d}/{self.total}",
            f"loss {record['loss']:9.5f}",
            f"grad {record['grad_norm']:8.3f}",
            f"lr {record['lr']:.2e}",
            *shown,
            f"{record['tokens_per_second']:7.0f} tok/s",
            f"{record['groups_per_second']:6.1f} groups/s",
            *([f"MFU {record['mfu']:5.1%}"] if "mfu" in record else []),
            f"{record['memory_gb']:5.2f} GB",
            f"{record['seconds']:6.2f} s",
            f"eta {duration(eta)}",
        ]
        return " | ".join(parts)

    def _print(self, text: str) -> None:
        self._bar.console.print(printable(text, keep="\n"), highlight=False, markup=False) if self._bar else say(text)

    def close(self, complete: bool = True) -> None:
        """End the bar, the files and the trackers, which are told whether the run is complete."""
        if self._bar:
            self._bar.stop()
        if self._file is not None and self._trackers is not None:
            self._trackers.close(complete)
            self._file.close()
