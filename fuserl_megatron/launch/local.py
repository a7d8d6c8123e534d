"""Stages on this machine, one after the other."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fuserl_megatron.launch.launcher import frozen
from fuserl_megatron.launch.ranks import die_with_parent
from fuserl_megatron.launch.stages import Pipeline, Stage, write_text
from fuserl_megatron.util.paths import REQUEUE


class Local:
    """One stage after the other, until one fails or is stopped to be continued."""

    def check(self, pipeline: Pipeline) -> None:
        """There is nothing that could be missing."""

    def plan(self, pipeline: Pipeline, stages: Sequence[Stage]) -> str:
        """Settings and commands."""
        parts = []
        for stage in stages:
            parts += [*frozen(stage), f"# ---- {stage.name}\n{shlex.join(local_command(stage))}\n"]
        return "\n".join(parts)

    def start(self, pipeline: Pipeline, stages: Sequence[Stage]) -> int:
        """Run them; the code of the one that failed."""
        for stage in stages:
            words = local_command(stage)
            print(f"---- {stage.name}: {shlex.join(words)}", flush=True)
            environ = dict(os.environ) | dict(pair.split("=", 1) for pair in stage.cluster.env)
            environ["FUSERL_COMMAND"] = shlex.join(["fuserl", *sys.argv[1:]])  # what a stopped run says continues it
            code = _wait(subprocess.Popen(words, env=environ, preexec_fn=die_with_parent))
            if code:
                print(
                    f"{stage.name} ended with exit code {code}; the stages after it were not started", file=sys.stderr
                )
                return code if code > 0 else 128 - code
            if stage.resumes and (Path(stage.results_dir) / REQUEUE).is_file():
                print(f"{stage.name} was stopped and has kept its work; the same command goes on with it")
                return 0
            write_text(pipeline.done_file(stage), stage.hash + "\n")
        return 0


LOCAL = Local()


def local_command(stage: Stage) -> list[str]:
    """What runs a stage on this machine."""
    program, *words = stage.command
    if program != "fuserl":
        return list(stage.command)
    ranks = ["--nproc", str(stage.cluster.num_ranks)] if stage.trains else []
    return [sys.executable, "-m", "fuserl_megatron.cli", *words, *ranks]


def _wait(process: subprocess.Popen) -> int:
    """Its exit code; TERM and USR1 are passed on, Ctrl-C reaches it by itself. What resumes then keeps its work."""
    signals = {number: lambda n, _: process.send_signal(n) for number in (signal.SIGTERM, signal.SIGUSR1)}
    signals[signal.SIGINT] = lambda *_: None
    before = {number: signal.signal(number, handler) for number, handler in signals.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
