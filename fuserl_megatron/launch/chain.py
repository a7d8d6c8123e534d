"""`fuserl launch`: freeze the settings of a chain, then run or submit the stages that are not done yet."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import fuserl_megatron
from fuserl_megatron.config.load import to_yaml
from fuserl_megatron.launch.launcher import launcher_of
from fuserl_megatron.launch.stages import Pipeline, Stage, write_text
from fuserl_megatron.util.locks import only_writer


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
    launcher = launcher_of(pipeline.config)
    if dry_run:
        print(launcher.plan(pipeline, todo))
        return 0
    if not todo:
        return 0
    launcher.check(pipeline)
    _freeze(pipeline, todo, overrides)
    return launcher.start(pipeline, todo)


def unfinished(pipeline: Pipeline) -> list[Stage]:
    """Stages without a marker of their settings, and those that read what these will write."""
    todo: dict[str, Stage] = {}
    for stage in pipeline.stages:
        if not pipeline.is_done(stage) or any(name in todo for name in stage.depends_on):
            todo[stage.name] = stage
    return list(todo.values())


def _freeze(pipeline: Pipeline, stages: Sequence[Stage], overrides: Sequence[str]) -> None:
    """Write down all that decides what the stages do, before any of them starts."""
    folder = pipeline.folder
    for stage in stages:
        (folder / "logs" / stage.name).mkdir(parents=True, exist_ok=True)
        if stage.config:
            for path, text in {stage.config_path: stage.config, **stage.more_config}.items():
                write_text(Path(path), text)
        for file in pipeline.done_files(stage):
            file.unlink(missing_ok=True)
    write_text(folder / "config.yaml", to_yaml(pipeline.config))
    origin = {
        "version": fuserl_megatron.__version__,
        "commit": _commit(),
        "overrides": list(overrides),
        "directory": os.getcwd(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_text(folder / "launch.json", json.dumps(origin, indent=2) + "\n")


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
