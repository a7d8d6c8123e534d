"""Who runs the stages of a chain: a launcher, of this package or a user's own (launcher=package.module:object).

`chain.py` decides which stages are left and freezes their settings; a launcher runs them. A stage is done once its
hash stands in `pipeline.done_file(stage)`: whatever runs a stage writes that file after the command has succeeded, and
not where the command was stopped to be continued (it leaves REQUEUE in stage.results_dir then and exits with 0).
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from fuserl_megatron.config.launch_sections import LaunchConfig
from fuserl_megatron.launch.stages import Pipeline, Stage
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.named import is_named, load_named
from fuserl_megatron.util.text import nearest

LAUNCHERS = {
    "local": "fuserl_megatron.launch.local:LOCAL",
    "slurm": "fuserl_megatron.launch.slurm:SLURM",
    "nemo": "fuserl_megatron.nemo.run:NEMO",
}
"""By name. launcher=fuserl takes the one that cluster.type names."""


@runtime_checkable
class Launcher(Protocol):
    """What runs stages."""

    def check(self, pipeline: Pipeline) -> None:
        """Raise UserError where stages cannot be started now. Nothing is written yet."""

    def plan(self, pipeline: Pipeline, stages: Sequence[Stage]) -> str:
        """What `start` would write and run, as text for `fuserl launch --dry-run`; nothing is written."""

    def start(self, pipeline: Pipeline, stages: Sequence[Stage]) -> int:
        """Run the stages, or submit them, in this order; each waits for those in its `depends_on`.

        Their settings are frozen: stage.config_path is there. Returns the exit code of `fuserl launch`.

        Raises:
            UserError: they cannot be submitted; none of them stays submitted.
        """


def launcher_of(config: LaunchConfig) -> Launcher:
    """The launcher that the settings name.

    Raises:
        UserError: there is none of that name, or it is no launcher.
    """
    name = config.launcher
    if is_named(name):
        found = load_named(name, "launcher")
        found = found() if isinstance(found, type) else found
        if not isinstance(found, Launcher):
            raise UserError(f"launcher={name}: a launcher has check, plan and start (docs/extending.md).")
        return found
    known = ("fuserl", "nemo")
    if name not in known:
        near = nearest(name, known)
        raise UserError(f"launcher={name}: not one of {', '.join(known)}, nor package.module:object.{near}")
    found = load_named(LAUNCHERS[config.cluster.type if name == "fuserl" else name], "launcher")
    assert isinstance(found, Launcher)
    return found


def frozen(stage: Stage) -> list[str]:
    """A stage's settings, as `plan` shows them."""
    files = {stage.config_path: stage.config, **stage.more_config} if stage.config else {}
    return [f"# ---- {path}\n{text}" for path, text in files.items()]
