"""Gloo workers for tests: a pool of spawned processes that stay alive, so that torch and core are imported once.

A test hands over a module-level function; it runs on `world_size` of the workers with torch.distributed's
environment set, and comes back as a list of the ranks' results. After each job the worker leaves its process groups.
"""

import contextlib
import gc
import multiprocessing as mp
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuserl_megatron.util.ports import reserved_port


def _worker(connection, path: list[str]) -> None:
    sys.path[:] = path
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", CUDA_DEVICE_MAX_CONNECTIONS="1")
    import torch

    torch.set_num_threads(1)
    while True:
        job = connection.recv_bytes()
        if not job:
            return
        try:
            environment, path_now, function, args = pickle.loads(job)
        except Exception:
            connection.send((False, traceback.format_exc()))
            continue
        os.environ.update(environment)
        sys.path[:] = path_now
        try:
            result = (True, function(*args))
        except BaseException:
            result = (False, traceback.format_exc())
        from fuserl_megatron.mcore import parallel

        try:
            parallel.shutdown()
            _let_go()
        except Exception:
            result = (False, f"{result[1]}\nand leaving the process groups failed:\n{traceback.format_exc()}")
        if not gc.get_freeze_count():
            gc.freeze()  # torch and core stay: later collections need not look at them
        connection.send(result)


def _let_go() -> None:
    """Free what the job left: every gloo group has two threads that poll, and hundreds of them take both cores.

    Models and optimizers are cycles that hold process groups; those of core's DDP go through autograd nodes, where the
    collector cannot follow, so they are cut.
    """
    from fuserl_megatron.mcore.model import DistributedDataParallel

    for left in gc.get_objects():
        if type(left) is DistributedDataParallel:
            for parameter in left.parameters():
                parameter.__dict__.clear()
            left.__dict__.clear()
    gc.collect()


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):  # no /proc
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


class Ranks:
    """A pool of worker processes. Use as a context manager or call `close`."""

    def __init__(self):
        self._context = mp.get_context("spawn")
        self._workers: list[tuple[mp.process.BaseProcess, Any]] = []

    def _grow(self, count: int) -> None:
        while len(self._workers) < count:
            here, there = self._context.Pipe()
            # not daemonic: core's checkpoint save starts processes of its own
            process = self._context.Process(target=_worker, args=(there, list(sys.path)))
            process.start()
            self._workers.append((process, here))

    def run(self, function: Callable, world_size: int, *args: Any, timeout: float = 900.0) -> list[Any]:
        """Results of function(*args) on ranks 0..world_size-1.

        Raises:
            RuntimeError: a rank raised (its traceback is the message) or did not answer within `timeout` seconds.
        """
        self._grow(world_size)
        with reserved_port() as reserved:
            return self._run(function, world_size, args, timeout, str(reserved.getsockname()[1]))

    def _run(self, function: Callable, world_size: int, args: tuple, timeout: float, port: str) -> list[Any]:
        for rank, (_, connection) in enumerate(self._workers[:world_size]):
            environment = dict(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            connection.send_bytes(pickle.dumps((environment, list(sys.path), function, args)))
        results: list[Any] = []
        failed: list[str] = []
        for rank, (_, connection) in enumerate(self._workers[:world_size]):
            if not connection.poll(timeout if not failed else 5.0):
                failed.append(f"rank {rank}: no answer")
                continue
            ok, value = connection.recv()
            (results if ok else failed).append(value if ok else f"rank {rank}:\n{value}")
        if failed:
            self.close(kill=True)
            raise RuntimeError("\n".join(failed))
        return results

    def close(self, kill: bool = False) -> None:
        """End all workers; a later `run` starts new ones."""
        for process, connection in self._workers:
            if kill:
                others = _children(process.pid or 0)
                process.kill()
                for other in others:  # core's process for the results of a save outlives a killed rank
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
            else:
                connection.send_bytes(b"")
            process.join(20)
        self._workers.clear()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()
