"""What a chain is: stages with their commands, resources and frozen settings. `pipeline.py` makes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fuserl_megatron.config.launch_sections import ClusterConfig, LaunchConfig
from fuserl_megatron.util.files import write_file


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One job of the chain."""

    name: str
    command: tuple[str, ...]
    """Program and words, the same on every rank; the first is `fuserl`, or the user's own program."""
    depends_on: tuple[str, ...] = ()
    """Stages of this chain that must have succeeded."""
    cluster: ClusterConfig
    """Resources and environment of this stage."""
    trains: bool = False
    """Whether it runs ranks of the trainer; the others are one process, without a GPU unless their own section asks."""
    resumes: bool = False
    """Whether it can be told to stop and be continued: then it ends with 0 and leaves REQUEUE in results_dir."""
    tasks: int = 0
    """Of an array job, each of which runs the command and finds its part by its number; 0: one job."""
    config: str = ""
    """Text of the frozen settings, to be written to config_path before the stage starts."""
    config_path: str = ""
    more_config: Mapping[str, str] = field(default_factory=dict)
    """Further frozen files, path -> text: those of the sources that are asked, or of the rewards."""
    results_dir: str
    """Where it writes."""
    hash: str
    """Of command, settings and those of every stage it depends on: a stage finished under the same hash is done."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A whole chain, resolved."""

    config: LaunchConfig
    stages: tuple[Stage, ...]
    """In an order in which each stands after those it depends on."""
    notes: tuple[str, ...] = ()
    """Which of the stages asked for have nothing to do, and why."""

    @property
    def root(self) -> Path:
        """run.results_dir, absolute."""
        return Path(self.config.run.results_dir)

    @property
    def folder(self) -> Path:
        """Frozen settings, job scripts, logs, markers."""
        return self.root / "launch"

    def done_file(self, stage: Stage) -> Path:
        """Holds the stage's hash once it has succeeded; of an array job each task's has the number behind it."""
        return self.folder / f"{stage.name}.done"

    def done_files(self, stage: Stage) -> list[Path]:
        """All of them."""
        file = self.done_file(stage)
        return [file.with_name(f"{file.name}.{task}") for task in range(stage.tasks)] or [file]

    def is_done(self, stage: Stage) -> bool:
        """Whether it has succeeded under these settings."""
        files = self.done_files(stage)
        return all(file.is_file() and file.read_text(encoding="utf-8").strip() == stage.hash for file in files)


def write_text(file: Path, text: str) -> None:
    """Write a small file of the chain, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, [text.encode()])
