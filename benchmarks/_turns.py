"""Programs timed side by side: each in a process of its own, set up once, then running a few steps in turn.

Only one of them works at a time, so a machine whose speed drifts slows all alike: what counts is the ratio of the times
of one turn, and its median over the turns. Wall-clock seconds are the figure; the processor seconds of the same steps
(all threads) stand beside them, for they move less where other programs want the processors too.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

Times = dict[str, list[float]]
"""wall and cpu: seconds a step, one entry a turn."""


class Worker:
    """A process that answers each request for N steps with the seconds they took."""

    def __init__(self, arguments: list[str], threads: int):
        """Start `python arguments...`; returns at once."""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._name = " ".join(arguments)

    def answer(self) -> dict:
        """Its next answer; the first one is what it says of itself when it is ready."""
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name}: ended before it answered (exit code {self._process.wait()})")
        return json.loads(line)

    def run(self, steps: int) -> dict[str, float]:
        """Wall and processor seconds a step."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return {clock: seconds / steps for clock, seconds in self.answer().items()}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


class Requests:
    """The worker's end: standard output carries answers alone, everything printed goes to standard error."""

    def __init__(self):
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._started = (0.0, 0.0)

    def ready(self, **facts) -> None:
        """Say that the set-up is done."""
        self._say(facts)

    def next(self) -> int | None:
        """How many steps are wanted; None when there is nobody left to ask."""
        line = sys.stdin.readline()
        self._started = (time.perf_counter(), time.process_time())
        return int(line) if line else None

    def done(self) -> None:
        """Answer the last request."""
        wall, cpu = self._started
        self._say(dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu))

    def serve(self, step: Callable[[], None], **facts) -> None:
        """Answer all requests with a function that runs one step."""
        self.ready(**facts)
        while (count := self.next()) is not None:
            for _ in range(count):
                step()
            self.done()

    def _say(self, answer: dict) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()


def take_turns(
    commands: dict[str, list[str]], turns: int, steps: int, threads: int, warm_up: int = 2
) -> tuple[dict[str, Times], dict[str, dict]]:
    """Seconds a step of every program in every turn.

    Args:
        commands: name -> arguments of python.
        turns: how often each gets its turn.
        steps: of one turn.
        threads: of torch in each process.
        warm_up: turns that are not counted.

    Returns:
        name -> its times, and name -> what the program said of itself.
    """
    workers = {name: Worker(arguments, threads) for name, arguments in commands.items()}
    try:
        facts = {name: worker.answer() for name, worker in workers.items()}
        times: dict[str, Times] = {name: dict(wall=[], cpu=[]) for name in workers}
        for turn in range(warm_up + turns):
            for name, worker in workers.items():
                for clock, seconds in worker.run(steps).items():
                    times[name][clock] += [seconds] if turn >= warm_up else []
    finally:
        for worker in workers.values():
            worker.close()
    return times, facts


def ratio(above: Times, below: Times, scale: float = 1.0) -> dict[str, float]:
    """Ratios of two programs' times, times `scale`.

    Returns:
        median, min and max over the turns of the wall clock's ratio; of_minima, the ratio of both sides' fastest turns;
        cpu, the median of the processor seconds' ratio.
    """
    wall = [scale * a / b for a, b in zip(above["wall"], below["wall"], strict=True)]
    cpu = [scale * a / b for a, b in zip(above["cpu"], below["cpu"], strict=True)]
    of_minima = scale * min(above["wall"]) / min(below["wall"])
    return dict(
        median=statistics.median(wall), min=min(wall), max=max(wall), of_minima=of_minima, cpu=statistics.median(cpu)
    )
