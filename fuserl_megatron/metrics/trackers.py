"""Where metrics.jsonl goes besides: TensorBoard, Weights & Biases, MLflow. Rank 0 alone.

A tracker that fails (no network, a full disk, a package that is not there) is given up with one warning; training goes
on. A continued run continues the same run of the tracker: its id is kept in the run's directory.
"""

import dataclasses
import math
import os
import re
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fuserl_megatron.config.keys import leaves
from fuserl_megatron.config.schema import Config
from fuserl_megatron.util.credentials import redact


class TensorBoard:
    """Events in results_dir/tensorboard."""

    def __init__(self, config: Config, directory: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step or None)

    def log(self, values: dict[str, float], step: int) -> None:
        """One step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        # one event for all values: one for each costs a small model several per cent of its step
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self.writer.file_writer.add_summary(summary, step)

    def close(self, complete: bool) -> None:
        """Write the rest."""
        self.writer.close()


class Wandb:
    """One Weights & Biases run. Its axis is the metric `step`: wandb's own counter cannot go back after a resume."""

    def __init__(self, config: Config, directory: Path, first_step: int):
        import wandb

        given, id_file = config.exp_manager.wandb_logger_kwargs, directory / "wandb_run_id"
        self.run = wandb.init(
            project=given.project,
            name=given.name or config.run.name,
            entity=given.entity,
            group=given.group,
            tags=given.tags or None,
            dir=str(directory),
            id=_read(id_file) or uuid.uuid4().hex[:8],
            resume="allow",
            mode="offline" if given.offline else None,
            config=dataclasses.asdict(config),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=30, login_timeout=30),
        )
        id_file.write_text(self.run.id)
        self.run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        """One step."""
        self.run.log(values | {"step": step})

    def close(self, complete: bool) -> None:
        """Upload the rest."""
        self.run.finish(exit_code=0 if complete else 1)


class Mlflow:
    """One MLflow run, through its client: the fluent interface keeps global state and looks into the environment."""

    def __init__(self, config: Config, directory: Path, first_step: int):
        # a server that is away is asked for half a minute, not for an hour; what the user has set stays
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient

        given, id_file = config.exp_manager.mlflow_logger_kwargs, directory / "mlflow_run_id"
        uri = given.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.client = MlflowClient(uri or f"sqlite:///{directory.resolve()}/mlflow.db")
        self.id = _read(id_file)
        if self.id:
            self.client.update_run(self.id, status="RUNNING")
            return
        name = given.experiment_name or config.run.name
        found = self.client.get_experiment_by_name(name)
        artifacts = None if uri else (directory.resolve() / "mlflow_artifacts").as_uri()
        experiment = found.experiment_id if found else self.client.create_experiment(name, artifacts)
        self.id = self.client.create_run(experiment, run_name=config.run.name).info.run_id
        id_file.write_text(self.id)
        for key, value in leaves(dataclasses.asdict(config)):
            self.client.log_param(self.id, key, str(value)[:500])

    def log(self, values: dict[str, float], step: int) -> None:
        """One step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(re.sub(r"[^\w/. -]", "_", name), value, now, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics)

    def close(self, complete: bool) -> None:
        """Mark the run as ended."""
        self.client.set_terminated(self.id, "FINISHED" if complete else "KILLED")


class Trackers:
    """Those that the configuration asks for and that still work."""

    def __init__(self, config: Config, directory: Path, first_step: int, say: Callable[[str], None]):
        """Open them; `first_step` steps are done already."""
        self.say, manager = say, config.exp_manager
        self.open: list[TensorBoard | Wandb | Mlflow] = []
        wanted: dict[type[TensorBoard | Wandb | Mlflow], bool] = {
            TensorBoard: manager.create_tensorboard_logger,
            Wandb: manager.create_wandb_logger,
            Mlflow: manager.create_mlflow_logger,
        }
        for kind in (kind for kind, is_wanted in wanted.items() if is_wanted):
            self._guarded(kind.__name__, partial(self._open, kind, config, directory, first_step))

    def log(self, record: dict, step: int) -> None:
        """The record's finite numbers, after `step` steps."""
        values = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v) and k != "step"}
        for tracker in list(self.open):
            if not self._guarded(type(tracker).__name__, partial(tracker.log, values, step)):
                self.open.remove(tracker)

    def close(self, complete: bool) -> None:
        """End them; `complete`: the run came to its end, nothing is left to do."""
        for tracker in self.open:
            self._guarded(type(tracker).__name__, partial(tracker.close, complete))
        self.open = []

    def _open(self, kind: type[TensorBoard | Wandb | Mlflow], config: Config, directory: Path, first_step: int) -> None:
        self.open.append(kind(config, directory, first_step))

    def _guarded(self, name: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # whatever a client of a service far away may raise
            why = redact(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
            install = " (pip install 'fuserl-megatron[track]')" if isinstance(error, ImportError) else ""
            self.say(f"warning: {name} is given up for this run, training goes on: {why}{install}")
            return False
        return True


def _read(file: Path) -> str | None:
    return file.read_text().strip() or None if file.is_file() else None
