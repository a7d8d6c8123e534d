"""Stages as SLURM jobs: one script each, chained by afterok, so that what reads a failed stage's output never starts.

The body of every script is that of slurm/train.sbatch: signals, requeue, a log per rank, containers.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from fuserl_megatron.launch.launcher import frozen
from fuserl_megatron.launch.stages import Pipeline, Stage, write_text
from fuserl_megatron.util.errors import UserError

BODY_FROM = "# From here on"
JOBS = "jobs.json"
"""In the chain's folder: the job id of each stage submitted."""


class Slurm:
    """One job a stage, each waiting for those it depends on."""

    def check(self, pipeline: Pipeline) -> None:
        """There must be a queue, and nothing of this chain in it from before."""
        if shutil.which("sbatch") is None:
            where = "there is no sbatch on PATH; log in to a node of the cluster, or cluster=local."
            raise UserError(f"cluster=slurm: {where}")
        jobs = _jobs(pipeline)
        if there := still_there(jobs):
            held = ", ".join(f"{name} ({jobs[name]} {state})" for name, state in there.items())
            ids = " ".join(jobs[name] for name in there)
            raise UserError(f"{pipeline.root}: in the queue from before: {held}; wait, or type scancel {ids}.")

    def plan(self, pipeline: Pipeline, stages: Sequence[Stage]) -> str:
        """Settings, job scripts and sbatch's command lines, in a form that a shell would take."""
        # a job's id is known when it is submitted; until then a word that needs no quotes stands for it
        parts, jobs = [], {stage.name: f"@{stage.name}@" for stage in stages}
        for stage in stages:
            words = sbatch_words(pipeline, stage, jobs)
            parts += [*frozen(stage), f"# ---- {words[-1]}\n{job_script(pipeline, stage)}"]
            submitted = re.sub(r"@(\w+)@", r"$\1", shlex.join(words[:-1]))
            parts.append(f"# ---- submit\n{stage.name}=$({submitted} {shlex.quote(words[-1])})\n")
        return "\n".join(parts)

    def start(self, pipeline: Pipeline, stages: Sequence[Stage]) -> int:
        """Write the scripts and submit them."""
        for stage in stages:
            write_text(pipeline.folder / f"{stage.name}.sbatch", job_script(pipeline, stage))
        logs = {stage.name: f"{pipeline.folder / stage.name}{'_*' if stage.tasks else ''}.log" for stage in stages}
        return record(pipeline, submit(pipeline, stages), logs)


SLURM = Slurm()


def record(pipeline: Pipeline, submitted: Mapping[str, str], logs: Mapping[str, str]) -> int:
    """Write down the jobs' ids by stage and say how to follow them; 0, the exit code."""
    write_text(pipeline.folder / JOBS, json.dumps(_jobs(pipeline) | dict(submitted), indent=2) + "\n")
    for name, log in logs.items():
        print(f"{name}: job {submitted[name]}, log {log}")
    ids = submitted.values()
    print(f"follow: squeue --jobs={','.join(ids)}    cancel: scancel {' '.join(ids)}")
    return 0


def _jobs(pipeline: Pipeline) -> dict[str, str]:
    file = pipeline.folder / JOBS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def job_script(pipeline: Pipeline, stage: Stage) -> str:
    """The text that sbatch gets; what it depends on stands on sbatch's command line (`sbatch_words`)."""
    cluster, folder = stage.cluster, pipeline.folder
    options = {
        "job-name": f"{pipeline.config.run.name}-{stage.name}",
        "output": str(folder / stage.name).replace("%", "%%") + ("_%a.log" if stage.tasks else ".log"),
        "array": f"0-{stage.tasks - 1}" if stage.tasks else None,
        "open-mode": "append",
        "chdir": str(Path.cwd()),
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.ranks_per_node,
        "gpus-per-node": cluster.gpus_per_node,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.mem,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time,
        "signal": f"B:USR1@{cluster.signal_seconds}" if stage.resumes else None,
    }
    lines = [f"#SBATCH --{name}={_quoted(str(value))}" for name, value in options.items() if value is not None]
    lines += [f"#SBATCH {option}" for option in ("--requeue", *cluster.sbatch_options)]
    variables = dict(pair.split("=", 1) for pair in cluster.env)
    variables |= {"FUSERL_MAX_REQUEUES": str(cluster.max_requeues)}
    if cluster.venv is not None:
        variables["FUSERL_VENV"] = cluster.venv
    if cluster.container is not None:
        variables["FUSERL_CONTAINER"] = cluster.container
        variables["FUSERL_CONTAINER_MOUNTS"] = ",".join(cluster.container_mounts)
    settings = {
        # training keeps its ranks' logs in its folder; that of build and convert is replaced as a whole when they end
        "logs": f"{stage.results_dir}/logs" if stage.trains else str(folder / "logs" / stage.name),
        "done_file": str(pipeline.done_file(stage)),
        "done_hash": stage.hash,
    }
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Stage {stage.name} of {pipeline.root}, by fuserl launch.",
            *lines,
            "",
            *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
            *cluster.setup,
            *(f"{name}={shlex.quote(value)}" for name, value in settings.items()),
            *(("logs+=/task_$SLURM_ARRAY_TASK_ID", "done_file+=.$SLURM_ARRAY_TASK_ID") if stage.tasks else ()),
            f"command=({shlex.join(stage.command)})",
            "",
            _body(),
        ]
    )


def sbatch_words(pipeline: Pipeline, stage: Stage, jobs: Mapping[str, str]) -> list[str]:
    """The command that submits a stage; jobs: id (or a stand-in for it) of each stage submitted before it."""
    waits = [f"afterok:{jobs[name]}" for name in stage.depends_on if name in jobs]
    if not waits and pipeline.config.cluster.dependency:
        waits = [pipeline.config.cluster.dependency]
    words = ["sbatch", "--parsable"]
    if waits:  # a job whose dependency cannot be met any more is cancelled instead of pending for ever
        words += [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"]
    return [*words, str(pipeline.folder / f"{stage.name}.sbatch")]


def submit(pipeline: Pipeline, stages: Sequence[Stage]) -> dict[str, str]:
    """Submit the stages, whose scripts are written; all of them or none. Returns the job id of each.

    Raises:
        UserError: what sbatch refused, in its own words.
    """
    jobs: dict[str, str] = {}
    for stage in stages:
        try:
            jobs[stage.name] = _call(sbatch_words(pipeline, stage, jobs)).partition(";")[0]
        except UserError as error:
            if jobs:
                subprocess.run(["scancel", *jobs.values()], capture_output=True, timeout=60)
            raise UserError(f"{stage.name}: {error}; nothing stays submitted.") from None
    return jobs


def still_there(jobs: Mapping[str, str]) -> dict[str, str]:
    """Those of the jobs that wait or run, with their state in SLURM's word."""
    if not jobs:
        return {}
    command = ["squeue", "--noheader", "--format=%F %T", f"--jobs={','.join(jobs.values())}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)  # fails where SLURM knows none of them
    states = dict(line.split() for line in done.stdout.splitlines())
    return {name: states[job] for name, job in jobs.items() if job in states}


def _body() -> str:
    package = Path(__file__).resolve().parents[1]
    for script in (package / "slurm" / "train.sbatch", package.parent / "slurm" / "train.sbatch"):
        if script.is_file():
            text = script.read_text(encoding="utf-8")
            return text[text.index(BODY_FROM) :]
    raise UserError(f"slurm/train.sbatch is missing beside {package}: install fuserl-megatron again.")


def _quoted(value: str) -> str:
    """A value as sbatch reads it in a script: quotes around anything unusual, a backslash before what they mean."""
    if re.fullmatch(r"[\w@%+=:,./-]+", value, re.ASCII):
        return value
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'"{escaped}"'


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        said = re.sub(r"\s*(sbatch: )?error: ", " ", done.stderr).split("\n")
        raise UserError(" ".join(" ".join(said).split()) or f"{command[0]} ended with exit code {done.returncode}")
    return done.stdout.strip()
