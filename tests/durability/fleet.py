"""Ranks of `fuserl train` that start in milliseconds: forked by a process that has imported everything.

A fork server (multiprocessing's) imports torch, core and the product once, starts no thread and no process group, and
forks every rank from there; the rank then runs the real command line with the environment that a launcher sets.
"""

import gc
import json
import multiprocessing as mp
import os
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    *("fuserl_megatron.train.loop", "fuserl_megatron.cli", "fuserl_megatron.launch.ranks", "hydra", "omegaconf"),
    *("pandas", "pyarrow.compute", "torch.profiler"),  # which others import when they need them
)


def case_settings(case: dict, results, *overrides: str) -> list[str]:
    """Overrides of a tiny run on the CPU: 7 prompts, 3 a step, checkpoints every two steps."""
    return [
        "trainer=cpu",
        "trainer.precision=32",
        f"model.path={case['policy']}",
        f"data.path={case['data']}",
        f"run.results_dir={results}",
        "data.seq_length=160",
        "data.micro_batch_size=2",
        "data.global_batch_size=3",
        "trainer.max_epochs=null",
        "exp_manager.create_tensorboard_logger=false",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
        "optim.lr=1e-3",
        *overrides,
    ]


def _rank(words: list[str], environment: dict[str, str], log: str, prelude) -> None:
    gc.freeze()  # what is inherited is no garbage: core collects at every save
    os.setsid()
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import torch

    from fuserl_megatron.cli import main

    torch.set_num_threads(1)
    if prelude is not None:
        prelude(int(environment["RANK"]))
    sys.argv = ["fuserl", *words]
    sys.exit(main(words))


class Fleet:
    """Starts runs; one for a whole test session."""

    def __init__(self):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOADED])

    def start(self, overrides: list[str], log: Path, world: int = 2, prelude=None) -> "Run":
        """Start `fuserl train` on `world` ranks; prelude(rank) is called in each before it begins."""
        from fuserl_megatron.launch.ranks import rank_environment
        from fuserl_megatron.util.ports import reserved_port

        reserved, ranks = reserved_port(), []
        port = reserved.getsockname()[1]
        for rank in range(world):
            environment = rank_environment(rank, world, port, {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
            words = ["train", *overrides]
            process = self._context.Process(target=_rank, args=(words, environment, str(log), prelude))
            process.start()
            ranks.append(process)
        return Run(ranks, log, reserved)


class Run:
    """The ranks of one run."""

    def __init__(self, ranks: list, log: Path, port: socket.socket):
        self.ranks, self.log, self._port = ranks, Path(log), port

    def alive(self) -> bool:
        """Whether any rank still runs."""
        return any(process.exitcode is None for process in self.ranks)

    def send(self, number: int, only: int | None = None) -> None:
        """A signal to all ranks, or to one."""
        for rank, process in enumerate(self.ranks):
            if only in (None, rank) and process.exitcode is None:
                os.kill(process.pid, number)

    def wait(self, timeout: float = 600.0) -> list[int]:
        """Exit codes; whatever still runs after `timeout` seconds is killed and the text of the log raised."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.ranks) if process.exitcode is None]
        if late:
            self.kill()
            raise TimeoutError(f"ranks {late} still ran after {timeout} s:\n{self.text()}")
        return [process.exitcode for process in self.ranks]

    def kill(self) -> None:
        """SIGKILL to all ranks and what they started."""
        for process in self.ranks:
            try:
                os.killpg(process.pid, 9)
            except (ProcessLookupError, PermissionError):
                process.kill()
            process.join()

    def text(self) -> str:
        """What the ranks said."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, condition, timeout: float = 600.0):
        """Wait until condition() is true and return it; the run's ending first is an error."""
        deadline = time.monotonic() + timeout
        while not (found := condition()):
            if not self.alive() or time.monotonic() > deadline:
                raise AssertionError(f"the run ended or {timeout} s passed before the moment came:\n{self.text()}")
            time.sleep(0.005)
        return found


def records(directory, name: str = "metrics.jsonl", whole: bool = True) -> list[dict]:
    """Lines of a JSONL file of a run; [] while it is not there. whole=False: the last may have been cut off."""
    path = Path(directory) / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if whole or line.endswith("\n")]
