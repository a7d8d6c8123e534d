"""Rewards that are a function of the user's: `package.module:function(prompt, response, record)`.

The function runs in worker processes with hard limits on wall-clock time, memory and output, without a network where
the kernel allows that. A call that hangs, crashes, forks, eats memory or prints without end costs its own row: the
worker is killed with everything it started, and another takes its place. This keeps faults of a rule from a run; it is
no sandbox against code that means harm.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from fuserl_megatron.config.score_sections import RuleReward
from fuserl_megatron.making.answers import Answer
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.machine import usable_cores

START_S = 120.0
"""Seconds that the import of a rule's module may take."""
MAX_ANSWER = 64 * 1024
GIB, MIB = 2**30, 2**20
Outcome = dict[str, Any]
"""{"value": number} and perhaps {"parts": {name: number}}, or {"error": why}."""


class _Worker:
    """One process with its two pipes; `task` is the position of the row it works on."""

    def __init__(self, name: str, settings: dict[str, Any]):
        words = [sys.executable, "-m", "fuserl_megatron.making.rule_worker", json.dumps(settings)]
        environ = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environ,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout
        for pipe in (self.requests, self.answers):
            os.set_blocking(pipe.fileno(), False)
        self.name, self.outbox, self.inbox = name, b"", b""
        self.task: int | None = None
        self.hello: dict[str, Any] | None = None
        self.deadline = time.monotonic() + START_S

    def give(self, task: int, record: dict[str, Any], time_limit: float) -> None:
        """Begin with a record."""
        self.task, self.outbox = task, json.dumps(record, default=str).encode() + b"\n"
        self.deadline = time.monotonic() + time_limit
        self.write()

    def write(self) -> None:
        """Send what the pipe takes of the request."""
        try:
            self.outbox = self.outbox[os.write(self.requests.fileno(), self.outbox) :]
        except BlockingIOError:
            pass
        except OSError:
            self.outbox = b""  # it is gone, which its other pipe will say

    def read(self) -> dict[str, Any] | None:
        """An answer when it is whole, None before.

        Raises:
            EOFError: the process is gone, or sends what is no answer.
        """
        try:
            piece = os.read(self.answers.fileno(), MAX_ANSWER)
        except BlockingIOError:
            return None
        self.inbox += piece
        if not piece or len(self.inbox) > MAX_ANSWER:
            raise EOFError
        if not self.inbox.endswith(b"\n"):
            return None
        line, self.inbox = self.inbox, b""
        try:
            return json.loads(line)
        except ValueError:
            raise EOFError from None

    def end(self, gone: bool = False) -> int:
        """Kill the process and everything in its group; returns its exit status. `gone`: its pipes are closed, which
        comes a moment before the status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1 if gone else 0)
        code = self.process.poll()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        ended = self.process.wait()
        self.requests.close()
        self.answers.close()
        return ended if code is None else code


class RulePool:
    """The workers of one rule. A context manager; not for several threads."""

    def __init__(self, name: str, reward: RuleReward):
        self.name, self.reward = name, reward
        self._settings = {
            "function": reward.function,
            "setting": f"rewards.{name}.function",
            "arguments": reward.arguments,
            "memory_bytes": int(reward.memory_gib * GIB),
            "output_bytes": int(reward.output_mib * MIB),
            "network": reward.network == "on",
        }
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self.num_restarts = 0

    def __enter__(self) -> "RulePool":
        """Start one worker, which says what the rule's code is.

        Raises:
            UserError: the function is not to be had.
        """
        self.about = self._first_hello()
        return self

    def __exit__(self, *_error: object) -> None:
        for worker in self._workers:
            worker.end()
        self._selector.close()

    def settings(self) -> dict[str, Any]:
        """What changes a value besides the settings: the code."""
        return {"code_sha256": self.about["sha256"]}

    def notes(self) -> dict[str, Any]:
        """Where the code lies, and what the kernel allowed."""
        return {name: self.about[name] for name in ("file", "no_network", "own_processes")}

    def warnings(self) -> list[str]:
        """What the kernel did not allow."""
        lines = []
        if self.reward.network == "off" and not self.about["no_network"]:
            lines.append(f"reward {self.name}: this kernel gives us no name space: the rule can use the network")
        if not self.about["own_processes"]:
            lines.append(f"reward {self.name}: a process that the rule starts and detaches may outlive it")
        return lines

    def outcomes(self, samples: Iterable[tuple[int, Answer]]) -> Iterator[tuple[int, Outcome]]:
        """Score samples, each under a position; outcomes come as they are ready."""
        waiting, more = iter(samples), True
        while True:
            for worker in self._workers:
                if more and worker.hello and worker.task is None:
                    found = next(waiting, None)
                    more = found is not None
                    if found is not None:
                        worker.give(found[0], found[1].record, self.reward.time_limit)
                        self._listen(worker)
            busy = [worker for worker in self._workers if worker.task is not None]
            if more and len(self._workers) < self._num_workers():
                self._start()
                continue
            if not more and not busy:
                return
            for worker, outcome in self._answers(busy):
                task, worker.task = worker.task, None
                if outcome is None or outcome.pop("restart", False):
                    outcome = self._replace(worker, outcome)
                assert task is not None
                yield task, outcome

    def _answers(self, busy: list[_Worker]) -> Iterator[tuple[_Worker, Outcome | None]]:
        """What came until somebody answered, ended or ran out of time; None for a process that is gone."""
        watched = [worker for worker in self._workers if worker in busy or not worker.hello]
        wait = min(worker.deadline for worker in watched) - time.monotonic()
        ready = self._selector.select(max(wait, 0))
        for entry, events in ready:
            if events & selectors.EVENT_WRITE and entry.data in self._workers:
                entry.data.write()
                self._listen(entry.data)
        late = [worker for worker in watched if time.monotonic() >= worker.deadline]
        for worker in dict.fromkeys([*(entry.data for entry, _ in ready), *late]):
            if worker not in self._workers:
                continue
            try:
                found = worker.read()
            except EOFError:
                found = {"gone": True}
            if found is None and worker in late:  # not even now, should we ourselves have slept
                found = self._too_late(worker)
            if found is None:
                continue
            if not worker.hello:
                self._greeted(worker, found)
            elif worker.task is not None:
                yield worker, None if "gone" in found else found
            elif "gone" in found:  # between two rows
                self._replace(worker, {})

    def _too_late(self, worker: _Worker) -> Outcome:
        if not worker.hello:
            return {"error": f"nothing after {START_S:g} s"}
        return {"error": f"time limit: no answer within {self.reward.time_limit:g} s", "restart": True}

    def _replace(self, worker: _Worker, found: Outcome | None) -> Outcome:
        """Put a fresh process in the place of one that is spoilt or gone; says of the latter how it ended."""
        self._selector.unregister(worker.answers)
        with contextlib.suppress(KeyError):
            self._selector.unregister(worker.requests)
        code = worker.end(gone=found is None)
        self._workers.remove(worker)
        self.num_restarts += 1
        self._start()
        return found if found is not None else {"error": f"the rule's process ended ({_how(code)})"}

    def _start(self) -> _Worker:
        worker = _Worker(self.name, self._settings)
        self._workers.append(worker)
        self._selector.register(worker.answers, selectors.EVENT_READ, worker)
        return worker

    def _listen(self, worker: _Worker) -> None:
        """Watch the request pipe exactly while something is left to send."""
        is_watched = worker.requests in self._selector.get_map()
        if worker.outbox and not is_watched:
            self._selector.register(worker.requests, selectors.EVENT_WRITE, worker)
        elif is_watched and not worker.outbox:
            self._selector.unregister(worker.requests)

    def _greeted(self, worker: _Worker, hello: dict[str, Any]) -> None:
        if "sha256" not in hello:
            where = f"rewards.{self.name}.function={self.reward.function}"
            why = hello.get("error") or f"its process ended ({_how(worker.end(gone=True))})"
            raise UserError(hello.get("refused") or f"{where}: cannot be imported ({why})")
        worker.hello = hello

    def _first_hello(self) -> dict[str, Any]:
        worker = self._start()
        try:
            while not worker.hello:
                list(self._answers([]))
        except BaseException:
            self.__exit__()
            raise
        return worker.hello

    def _num_workers(self) -> int:
        return usable_cores() if self.reward.workers == "auto" else self.reward.workers


def _how(code: int) -> str:
    """The words for an exit status, of the process itself or as the outer process of a name space passes it on."""
    number = -code if code < 0 else code - 128
    if 0 < number < 65:
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return f"{name}, perhaps out of memory" if number == signal.SIGKILL else name
    return f"exit code {code}"
