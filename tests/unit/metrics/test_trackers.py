"""TensorBoard, W&B and MLflow as a run uses them, each writing for real (offline), and one that fails."""

import importlib
import json
import sqlite3
import struct

import pytest

from fuserl_megatron.config.load import load_config
from fuserl_megatron.metrics import trackers
from fuserl_megatron.metrics.trackers import Trackers

M = "exp_manager."
WANDB = [M + "create_wandb_logger=true", M + "wandb_logger_kwargs.project=p"]
MLFLOW = [M + "create_mlflow_logger=true"]
NO_TENSORBOARD = M + "create_tensorboard_logger=false"


def needs(package):
    """Skip where it is not installed; importing it here would cost seconds in every run of the suite."""
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not found, reason=f"{package} is not installed: pip install 'fuserl-megatron[track]'")


def run(directory, overrides, steps, first=0, complete=True):
    """Log `steps`; returns the warnings."""
    config, said = load_config("train", ["model.path=/m", "data.path=/d", *overrides]), []
    directory.mkdir(exist_ok=True)
    opened = Trackers(config, directory, first, said.append)
    for step in steps:
        opened.log({"step": step, "loss": step / 2, "a/b@c": 1, "nothing": None, "nan": float("nan")}, step)
    opened.close(complete)
    return said


def test_tensorboard_is_there_by_default(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(tmp_path, [], [1, 2]) == []
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 0.5), (2, 1.0)]
    assert sorted(read.Tags()["scalars"]) == ["a/b@c", "loss"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tensorboard"]


def test_a_tracker_that_fails_is_given_up_with_one_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", "canary-0123456789")

    class Away(trackers.TensorBoard):
        def log(self, values, step):
            raise ConnectionError("no route to host, asked with canary-0123456789")

    monkeypatch.setattr(trackers, "Mlflow", Away)
    (warning,) = run(tmp_path, MLFLOW, [1, 2, 3])
    assert warning.startswith("warning: Away is given up") and "no route to host" in warning
    assert "canary" not in warning and "$SERVICE_TOKEN" in warning
    assert list((tmp_path / "tensorboard").iterdir()), "the others go on"


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    (warning,) = run(tmp_path, [*WANDB, NO_TENSORBOARD], [1])
    assert "fuserl-megatron[track]" in warning


@needs("mlflow")
def test_mlflow_writes_and_continues_its_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert run(tmp_path, [*MLFLOW, NO_TENSORBOARD], [1, 2, 3], complete=False) == []
    assert run(tmp_path, [*MLFLOW, NO_TENSORBOARD], [3, 4], first=2) == []
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        ((run_id, status),) = db.execute("select run_uuid, status from runs").fetchall()
        steps = db.execute("select distinct step, value from metrics where key='loss' order by step").fetchall()
        keys = {key for (key,) in db.execute("select distinct key from metrics")}
        params = dict(db.execute("select key, value from params"))
    assert run_id == (tmp_path / "mlflow_run_id").read_text() and status == "FINISHED"
    assert steps == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert keys == {"loss", "a/b_c"} and params["optim.lr"] == "5e-06"


@needs("mlflow")
def test_mlflow_server_away(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = [*MLFLOW, NO_TENSORBOARD, M + "mlflow_logger_kwargs.tracking_uri='http://127.0.0.1:9'"]
    (warning,) = run(tmp_path, settings, [1, 2])
    assert warning.startswith("warning: Mlflow is given up")


@needs("wandb")
def test_wandb_writes_and_continues_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(tmp_path, [*WANDB, NO_TENSORBOARD], [1, 2, 3], complete=False) == []
    assert run(tmp_path, [*WANDB, NO_TENSORBOARD], [3, 4], first=2) == []
    importlib.import_module("wandb").teardown()  # as the end of a process does: its writer has put all on the disk
    run_id, logged = (tmp_path / "wandb_run_id").read_text(), []
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and {f.stem for f in files} == {f"run-{run_id}"}
    for file in files:
        logged += wandb_history(file)
    assert logged == [(1, 0.5), (2, 1.0), (3, 1.5), (3, 1.5), (4, 2.0)]


def wandb_history(file):
    """(step, loss) of every line logged, read from wandb's own file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, lines = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no record's header crosses a block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                lines.append((items["step"], items["loss"]))
    return lines


@needs("wandb")
def test_wandb_server_away(tmp_path, monkeypatch):
    importlib.import_module("wandb").teardown()  # its settings are read from the environment once a process
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "c" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (warning,) = run(tmp_path, [*WANDB, NO_TENSORBOARD], [1, 2])
    assert warning.startswith("warning: Wandb is given up") and "c" * 40 not in warning
