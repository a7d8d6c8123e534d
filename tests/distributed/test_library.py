"""The package as a library: examples/library/fuse.py as a user runs it, and what the functions refuse."""

import os
import runpy
from pathlib import Path

import pytest

import fuserl_megatron
from fuserl_megatron.util.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "library" / "fuse.py"


def run_example(directory):
    """In a process that nobody started as a rank; returns the figures and whether it is none afterwards."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ["FUSERL_EXAMPLE"] = directory
    found = runpy.run_path(str(EXAMPLE))
    return found["figures"], "RANK" not in os.environ and "MASTER_PORT" not in os.environ


def test_the_example_runs(ranks, tmp_path):
    ((figures, unchanged),) = ranks.run(run_example, 1, str(tmp_path))
    assert unchanged and set(figures) == {"model", "data", "fusesft", "fusepo", "before"}
    assert figures["fusepo"]["loss"] < figures["before"]["fusepo"]["loss"]
    assert (tmp_path / "fusepo" / "hf" / "model.safetensors").is_file()
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").is_file()


def test_every_name_is_there_and_rooms_stay_rooms():
    from fuserl_megatron import convert, train
    from fuserl_megatron.train import schedule

    assert {name: callable(getattr(fuserl_megatron, name)) for name in fuserl_megatron.__all__ if name != "LOSSES"} == {
        name: True for name in ("build", "convert", "evaluate", "load_config", "train")
    }
    assert train.schedule is schedule and convert is fuserl_megatron.convert
    assert "ln_dpo" in fuserl_megatron.LOSSES and "LOSSES" in dir(fuserl_megatron)
    with pytest.raises(AttributeError, match="has no attribute 'evaluat'"):
        fuserl_megatron.evaluat  # noqa: B018


def test_mistakes_are_one_line(tmp_path):
    config = fuserl_megatron.load_config("train", ["model.path=nowhere", "data.path=d", f"run.results_dir={tmp_path}"])
    for call in (fuserl_megatron.train, fuserl_megatron.evaluate):
        with pytest.raises(UserError, match="model.path=nowhere: no such directory"):
            call(config)
    with pytest.raises(UserError, match="to=gguf: must be megatron or hf"):
        fuserl_megatron.convert(tmp_path, tmp_path / "x", to="gguf")
