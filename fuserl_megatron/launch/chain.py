"""`fuserl launch`: freeze the settings of a chain, then run or submit the stages that are not done yet."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fuserl_megatron
from fuserl_megatron.config.load import to_yaml
from fuserl_megatron.launch import slurm
from fuserl_megatron.launch.ranks import die_with_parent
from fuserl_megatron.launch.stages import Pipeline, Stage
from fuserl_megatron.nemo import run as nemo
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.locks import only_writer

MARKER = "REQUEUE"
"""The file that a training leaves in its results_dir when it was stopped to be continued (runtime/stopping.py)."""


def launch(pipeline: Pipeline, overrides: Sequence[str], dry_run: bool) -> int:
    """Do what `fuserl launch` does; returns the exit code.

    Raises:
        UserError: it cannot be submitted, or stages of an earlier launch are still in the queue.
    """
    if dry_run:
        return _launch(pipeline, overrides, dry_run)
    with only_writer(pipeline.root / ".launch.lock", pipeline.root, "choose another run.results_dir"):
        return _launch(pipeline, overrides, dry_run)


def _launch(pipeline: Pipeline, overrides: Sequence[str], dry_run: bool) -> int:
    todo = unfinished(pipeline)
    for line in pipeline.notes:
        print(line)
    for stage in pipeline.stages:
        if stage not in todo:
            print(f"{stage.name}: done ({pipeline.done_file(stage)})")
    on_slurm = pipeline.config.cluster.type == "slurm"
    by_nemo = pipeline.config.launcher == "nemo"
    if dry_run:
        print(_plan(pipeline, todo, on_slurm))
        if by_nemo and todo:
            nemo.hand_over(pipeline, todo, local_command, dry_run=True)
        return 0
    if not todo:
        return 0
    if on_slurm:
        slurm.check_available()
        record = pipeline.folder / "jobs.json"
        jobs = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        if there := slurm.still_there(jobs):
            held = ", ".join(f"{name} ({jobs[name]} {state})" for name, state in there.items())
            ids = " ".join(jobs[name] for name in there)
            raise UserError(f"{pipeline.root}: in the queue from before: {held}; wait, or type scancel {ids}.")
        _freeze(pipeline, todo, overrides)
        submitted = nemo.hand_over(pipeline, todo, local_command) if by_nemo else slurm.submit(pipeline, todo)
        _write(record, json.dumps(jobs | submitted, indent=2) + "\n")
        for stage in todo:
            log = "in $NEMORUN_HOME" if by_nemo else f"{pipeline.folder / stage.name}.log"
            print(f"{stage.name}: job {submitted[stage.name]}, log {log}")
        ids = submitted.values()
        print(f"follow: squeue --jobs={','.join(ids)}    cancel: scancel {' '.join(ids)}")
        return 0
    _freeze(pipeline, todo, overrides)
    if not by_nemo:
        return _run_here(pipeline, todo)
    nemo.hand_over(pipeline, todo, local_command)
    for stage in unfinished(pipeline)[:1]:
        print(f"{stage.name} did not come to its end; the same command goes on with it", file=sys.stderr)
        return 1
    return 0


def unfinished(pipeline: Pipeline) -> list[Stage]:
    """Stages without a marker of their settings, and those that read what these will write."""
    todo: dict[str, Stage] = {}
    for stage in pipeline.stages:
        file = pipeline.done_file(stage)
        done = file.is_file() and file.read_text(encoding="utf-8").strip() == stage.hash
        if not done or any(name in todo for name in stage.depends_on):
            todo[stage.name] = stage
    return list(todo.values())


def local_command(stage: Stage) -> list[str]:
    """What runs a stage on this machine."""
    program, *words = stage.command
    if program != "fuserl":
        return list(stage.command)
    ranks = ["--nproc", str(stage.cluster.num_ranks)] if stage.trains else []
    return [sys.executable, "-m", "fuserl_megatron.cli", *words, *ranks]


def _plan(pipeline: Pipeline, stages: Sequence[Stage], on_slurm: bool) -> str:
    """What would be written and run, in a form that a shell would take."""
    # a job's id is known when it is submitted; until then a word that needs no quotes stands for it
    parts, jobs = [], {stage.name: f"@{stage.name}@" for stage in stages}
    for stage in stages:
        if stage.config:
            parts.append(f"# ---- {stage.config_path}\n{stage.config}")
        if pipeline.config.launcher == "nemo":
            continue
        if not on_slurm:
            parts.append(f"# ---- {stage.name}\n{shlex.join(local_command(stage))}\n")
            continue
        words = slurm.sbatch_words(pipeline, stage, jobs)
        parts.append(f"# ---- {words[-1]}\n{slurm.job_script(pipeline, stage)}")
        submitted = re.sub(r"@(\w+)@", r"$\1", shlex.join(words[:-1]))
        parts.append(f"# ---- submit\n{stage.name}=$({submitted} {shlex.quote(words[-1])})\n")
    return "\n".join(parts)


def _freeze(pipeline: Pipeline, stages: Sequence[Stage], overrides: Sequence[str]) -> None:
    """Write down all that decides what the stages do, before any of them starts."""
    folder = pipeline.folder
    for stage in stages:
        (folder / "logs" / stage.name).mkdir(parents=True, exist_ok=True)
        if stage.config:
            _write(Path(stage.config_path), stage.config)
        if stage.cluster.type == "slurm" and pipeline.config.launcher == "fuserl":
            _write(folder / f"{stage.name}.sbatch", slurm.job_script(pipeline, stage))
        with contextlib.suppress(FileNotFoundError):
            pipeline.done_file(stage).unlink()
    _write(folder / "config.yaml", to_yaml(pipeline.config))
    origin = {
        "version": fuserl_megatron.__version__,
        "commit": _commit(),
        "overrides": list(overrides),
        "directory": os.getcwd(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    _write(folder / "launch.json", json.dumps(origin, indent=2) + "\n")


def _run_here(pipeline: Pipeline, stages: Sequence[Stage]) -> int:
    """One stage after the other, until one fails or is stopped to be continued."""
    for stage in stages:
        words = local_command(stage)
        print(f"---- {stage.name}: {shlex.join(words)}", flush=True)
        environ = dict(os.environ) | dict(pair.split("=", 1) for pair in stage.cluster.env)
        environ["FUSERL_COMMAND"] = shlex.join(["fuserl", *sys.argv[1:]])  # what a stopped run says continues it
        code = _wait(subprocess.Popen(words, env=environ, preexec_fn=die_with_parent))
        if code:
            print(f"{stage.name} ended with exit code {code}; the stages after it were not started", file=sys.stderr)
            return code if code > 0 else 128 - code
        if stage.trains and (Path(stage.results_dir) / MARKER).is_file():
            print(f"{stage.name} was stopped and has saved; the same command goes on with it")
            return 0
        _write(pipeline.done_file(stage), stage.hash + "\n")
    return 0


def _wait(process: subprocess.Popen) -> int:
    """Its exit code; TERM and USR1 are passed on, Ctrl-C reaches it by itself: training saves, the others end."""
    signals = {number: lambda n, _: process.send_signal(n) for number in (signal.SIGTERM, signal.SIGUSR1)}
    signals[signal.SIGINT] = lambda *_: None
    before = {number: signal.signal(number, handler) for number, handler in signals.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _commit() -> str | None:
    """The checkout's commit, with + where files differ from it; None for an installed wheel."""
    checkout = Path(fuserl_megatron.__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=20)
        return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
    return None
