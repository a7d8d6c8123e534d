"""The stages of `fuserl launch launcher=nemo`: one task of a nemo-run experiment each, through its SlurmExecutor
(cluster=slurm) or its LocalExecutor (cluster=local).

A task is a shell script (`task_script`), the same on every rank; nemo-run makes the job around it. Its LocalExecutor
starts a stage although one before it has failed, so every script asks for the marks of those it depends on.
"""

import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuserl_megatron.launch.launcher import frozen
from fuserl_megatron.launch.local import local_command
from fuserl_megatron.launch.slurm import SLURM, record
from fuserl_megatron.launch.stages import Pipeline, Stage
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.paths import REQUEUE

RANKS = """\
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export CUDA_DEVICE_MAX_CONNECTIONS=1 FUSERL_COMMAND="scontrol requeue $SLURM_JOB_ID"
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
  end=$(squeue --noheader --format=%e --jobs="$SLURM_JOB_ID") || end=""
  case $end in [0-9]*T*) export SLURM_JOB_END_TIME="$(date -d "$end" +%s)" ;; esac
fi
"""
"""Before srun: one task a rank needs no torchrun, whose fixed port 29500 two jobs on a node would share."""
INSTALL = "pip install 'fuserl-megatron[nemo]'"


def task_script(pipeline: Pipeline, stage: Stage, command: Sequence[str]) -> str:
    """What nemo-run's task does: wait for nobody, run the stage, mark it as done, or queue it again where it saved."""
    done = shlex.quote(str(pipeline.done_file(stage)))
    hashes = {other.name: (other.hash, pipeline.done_file(other)) for other in pipeline.stages}
    lines = [f"cd {shlex.quote(os.getcwd())} || exit 2"]  # nemo-run starts tasks in a folder of its own
    for name in stage.depends_on:
        digest, file = hashes[name]
        missing = shlex.quote(f"fuserl: error: {stage.name} reads what {name} writes, and that is not done")
        lines.append(f"grep -qsx {digest} {shlex.quote(str(file))} || {{ echo {missing} >&2; exit 1; }}")
    pairs = (pair.split("=", 1) for pair in stage.cluster.env)
    lines += [f"export {name}={shlex.quote(value)}" for name, value in pairs]
    if stage.cluster.venv is not None:
        lines.append(f"source {shlex.quote(stage.cluster.venv)}/bin/activate")
    lines += stage.cluster.setup
    marker = shlex.quote(f"{stage.results_dir}/{REQUEUE}")
    again = f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {stage.cluster.max_requeues} ]'
    return "\n".join(
        [
            *lines,
            "told=0",
            "trap : USR1; trap told=1 TERM  # SLURM gives a signal to the ranks as well, which save and end",
            shlex.join(command),
            "code=$?",
            f'if [ "$code" = 0 ] && [ "{int(stage.resumes)}" = 1 ] && [ -e {marker} ]; then',
            "  code=75  # it was stopped and has saved: not 0, because what waits for it must not start",
            f'  if [ -n "${{SLURM_JOB_ID:-}}" ] && [ "$told" = 0 ] && {again}; then',
            '    [ "$SLURM_PROCID" != 0 ] || { sleep 2; scontrol requeue "$SLURM_JOB_ID"; }',
            "    sleep 60  # the job ends here",
            "  fi",
            'elif [ "$code" = 0 ] && [ "${SLURM_PROCID:-0}" = 0 ]; then',
            f"  echo {stage.hash} > {done}.partial && mv {done}.partial {done}",
            "fi",
            'exit "$code"',
            "",
        ]
    )


def executor_settings(pipeline: Pipeline, stage: Stage) -> dict[str, Any]:
    """Keyword arguments of nemo-run's SlurmExecutor for a stage, without its tunnel and packager.

    Raises:
        UserError: something that nemo-run asks for is not set.
    """
    cluster = stage.cluster
    if cluster.account is None:
        raise UserError("cluster.account=null: nemo-run's SlurmExecutor needs one; type cluster.account=NAME.")
    more: dict[str, Any] = {"kill_on_invalid_dep": "yes"}
    for option in cluster.sbatch_options:
        name, has_value, value = option.removeprefix("--").partition("=")
        more[name.replace("-", "_")] = value if has_value else True
    if cluster.dependency and not stage.depends_on:
        more["dependency"] = cluster.dependency
    settings = {
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.ranks_per_node,
        "gpus_per_node": cluster.gpus_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "mem": cluster.mem,
        "job_name_prefix": f"{pipeline.config.run.name}-",
        "signal": f"USR1@{cluster.signal_seconds}" if stage.resumes else None,
        "container_image": cluster.container,
        "container_mounts": list(cluster.container_mounts),
        "additional_parameters": more,
        "setup_lines": RANKS,
    }
    # a time of None is the partition's, where nemo-run's own default would be ten minutes
    return {"time": cluster.time} | {name: value for name, value in settings.items() if value is not None}


class Nemo:
    """The stages as tasks of a nemo-run experiment: submitted on SLURM, run to their end on this machine."""

    def check(self, pipeline: Pipeline) -> None:
        """As fuserl's own launcher: nemo-run submits to the same queue."""
        if _on_slurm(pipeline):
            SLURM.check(pipeline)

    def plan(self, pipeline: Pipeline, stages: Sequence[Stage]) -> str:
        """Settings, tasks, and the job scripts that nemo-run makes of them."""
        parts = [part for stage in stages for part in frozen(stage)]
        if not stages:
            return ""
        with tempfile.TemporaryDirectory(prefix="fuserl-nemo-") as passing:
            home = Path(passing)
            with _experiment(pipeline, stages, home) as experiment:
                scripts = _add_tasks(experiment, pipeline, stages, home)
                parts += [f"# ---- task of {name}\n{script}" for name, script in scripts.items()]
                experiment.dryrun(log=False, delete_exp_dir=False)
                for stage in stages if _on_slurm(pipeline) else ():
                    (file,) = home.rglob(f"*{stage.name}_sbatch.sh")
                    parts.append(f"# ---- job of {stage.name}\n{file.read_text(encoding='utf-8')}")
        return "\n".join(parts)

    def start(self, pipeline: Pipeline, stages: Sequence[Stage]) -> int:
        """Hand them over."""
        on_slurm = _on_slurm(pipeline)
        home = Path(os.environ.setdefault("NEMORUN_HOME", str(pipeline.folder / "nemo_run")))
        with _experiment(pipeline, stages, home) as experiment:
            _add_tasks(experiment, pipeline, stages, home)
            experiment.run(detach=on_slurm)  # detached: waiting would ask sacct, which not every cluster has
            jobs = {job.id: job.handle.rpartition("/")[2] for job in experiment.jobs} if on_slurm else {}
        if on_slurm:
            return record(pipeline, jobs, {stage.name: "in $NEMORUN_HOME" for stage in stages})
        for stage in stages:
            if not pipeline.is_done(stage):
                print(f"{stage.name} did not come to its end; the same command goes on with it", file=sys.stderr)
                return 1
        return 0


NEMO = Nemo()


def _on_slurm(pipeline: Pipeline) -> bool:
    return pipeline.config.cluster.type == "slurm"


def _experiment(pipeline: Pipeline, stages: Sequence[Stage], home: Path) -> Any:
    """An empty experiment, to be entered. UserError: nemo-run is not installed, or not usable with these settings."""
    if _on_slurm(pipeline):
        for stage in stages:
            executor_settings(pipeline, stage)
    try:
        import nemo_run as run  # after its home is set, which it reads once
    except ImportError as error:
        raise UserError(f"launcher=nemo: nemo-run cannot be imported ({error}); type {INSTALL}.") from None
    options = dict(base_dir=str(home), skip_status_at_exit=True, enable_goodbye_message=False, log_level="WARNING")
    return run.Experiment(pipeline.config.run.name, **options)


def _add_tasks(experiment: Any, pipeline: Pipeline, stages: Sequence[Stage], home: Path) -> dict[str, str]:
    """A task a stage; returns their scripts."""
    import nemo_run as run

    names, scripts = {stage.name for stage in stages}, {}
    for stage in stages:
        if _on_slurm(pipeline):
            values = executor_settings(pipeline, stage)
            values |= {"tunnel": run.LocalTunnel(job_dir=str(home / "experiments"))}
            executor = run.SlurmExecutor(**values, packager=run.Packager(), poll_estimated_start_time=False)
        else:
            executor = run.LocalExecutor(packager=run.Packager())
        command = stage.command if _on_slurm(pipeline) else local_command(stage)
        scripts[stage.name] = script = task_script(pipeline, stage, command)
        waits = [name for name in stage.depends_on if name in names]
        experiment.add(run.Script(inline=script), executor=executor, name=stage.name, dependencies=waits)
    return scripts
