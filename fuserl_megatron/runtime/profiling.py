"""A trace of some steps by torch's profiler, one file a rank (exp_manager.profile_steps)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fuserl_megatron.config.schema import ExpManagerConfig
from fuserl_megatron.metrics.run_log import say


class StepProfiler:
    """Records the steps asked for and writes their trace when the last of them, or the run, ends."""

    def __init__(self, settings: ExpManagerConfig, results_dir: Path, rank: int):
        self.first, self.last = settings.profile_steps or (0, 0)
        folder = Path(settings.profile_dir) if settings.profile_dir else results_dir / "profile"
        self.file, self.rank = folder / f"rank{rank}.json", rank
        self._profiler: Any = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """One optimizer step, counted from 1."""
        if self._profiler is None and self.first <= step <= self.last:
            import torch

            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
        yield
        if self._profiler is not None and step >= self.last:
            self.close()

    def close(self) -> None:
        """Write what was recorded."""
        if self._profiler is None:
            return
        self._profiler.stop()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.file))
        self._profiler = None
        self.last = 0
        if self.rank == 0:
            say(f"trace of the steps from {self.first} on: {self.file.parent}")
