"""A checkpoint whose pickles would run a command is refused, in one line that names the command, before anything runs:
by a resumed training, by `verify` and by the offline conversion. Without the check core does run it."""

import io
import os
import pickle
import shutil
import sys
from types import ModuleType
from unittest.mock import patch

import numpy
import pytest
import torch
from fusion_case import SFT, make_case, make_config

from fuserl_megatron import cli
from fuserl_megatron.mcore.manifest import MANIFEST, describe, write_manifest
from fuserl_megatron.mcore.safe_load import check_pickles
from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model


class Evil:
    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return os.system, (f"touch {self.touched}",)


def plant_index(folder, evil):
    (folder / ".metadata").write_bytes(pickle.dumps(evil))


def plant_beside_a_good_index(folder, evil):
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = {"more": evil}
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def plant_common(folder, evil):
    common = torch.load(folder / "common.pt", weights_only=False)
    torch.save(common | {"more": evil}, folder / "common.pt")


def plant_extra_state(folder, evil, value=None):
    """In the few bytes of a module's extra state, inside a file of numbers."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    key, place = next((k, p) for k, p in index.storage_data.items() if "_extra_state" in k.fqn)
    stream = io.BytesIO()
    torch.save([evil] if value is None else value, stream)
    with open(folder / place.relative_path, "ab") as file:
        start = file.tell()
        file.write(stream.getvalue())
    place.offset, place.length = start, len(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def plant_fp8_state(folder, evil):
    """As Transformer Engine keeps it: a pickle inside a tensor of bytes, which it would unpickle."""
    inner = torch.frombuffer(bytearray(pickle.dumps(evil)), dtype=torch.uint8)
    plant_extra_state(folder, evil, [inner])


class Nested:
    def __init__(self, evil):
        stream = io.BytesIO()
        torch.save(evil, stream)
        self.content = stream.getvalue()

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


def plant_storage_in_fp8_state(folder, evil):
    """One more level down: what is taken for a tensor's numbers is a pickle itself."""
    plant_fp8_state(folder, Nested(evil))


class Storage(Nested):
    """As core 0.19 lets torch write one."""

    def __reduce__(self):
        return sys.modules["megatron.core.safe_globals"].safe_load_from_bytes, (self.content,)


def safe_load_from_bytes(content):
    raise AssertionError("called")


def plant_harmless_fp8_state(folder, evil):
    names = ("transformer_engine", "transformer_engine.common", "transformer_engine.common.recipe")
    modules = {name: ModuleType(name) for name in names}  # only so that pickle can write the name down
    recipe = modules[names[-1]].DelayedScaling = type("DelayedScaling", (), {"__module__": names[-1]})
    own = "megatron.core.safe_globals"
    if not hasattr(sys.modules.get(own), "safe_load_from_bytes"):  # core before 0.19
        modules[own] = ModuleType(own)
        modules[own].safe_load_from_bytes = safe_load_from_bytes
    state = {"scale_fwd": torch.ones(3), "amax": numpy.ones(3), "storage": Storage(torch.ones(3)), "recipe": recipe()}
    with patch.dict(sys.modules, modules), patch.object(safe_load_from_bytes, "__module__", own):
        plant_fp8_state(folder, state)


PLANTS = [
    plant_index,
    plant_beside_a_good_index,
    plant_common,
    plant_extra_state,
    plant_fp8_state,
    plant_storage_in_fp8_state,
]
by_name = pytest.mark.parametrize("plant", PLANTS, ids=lambda f: f.__name__)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "hf"
    save_tiny_model(directory)
    save_char_tokenizer(directory)
    assert cli.main(["convert", "hf-to-megatron", str(directory), str(directory.parent / "megatron")]) == 0
    return directory, directory.parent / "megatron"


@pytest.fixture
def planted(model, tmp_path):
    def make(plant):
        shutil.copytree(model[1], tmp_path / "bad")
        plant(tmp_path / "bad" / "iter_0000000", Evil(tmp_path / "touched"))
        return tmp_path / "bad"

    return make


def refused(text):
    return "names posix.system" in text and "not opened" in text and "\n" not in text


@by_name
def test_verify_refuses(model, planted, tmp_path, plant, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "FUSERL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.main(["verify", str(model[0]), str(planted(plant)), "--max-new-tokens", "1"]) == 2
    assert refused(capsys.readouterr().err.rstrip("\n"))
    assert not (tmp_path / "touched").exists()


@by_name
def test_offline_conversion_refuses_or_does_not_open_it(planted, tmp_path, plant, capsys):
    code = cli.main(["convert", "megatron-to-hf", str(planted(plant)), str(tmp_path / "out")])
    in_index = plant in (plant_index, plant_beside_a_good_index)
    assert code == (2 if in_index else 0)
    assert not in_index or refused(capsys.readouterr().err.rstrip("\n"))
    assert not (tmp_path / "touched").exists()


def test_honest_extra_state_passes(planted):
    check_pickles(planted(plant_harmless_fp8_state) / "iter_0000000")


def resume(config, unchecked):
    """The error of a run, or None."""
    from fuserl_megatron.config.schema import UserError
    from fuserl_megatron.mcore import checkpoint
    from fuserl_megatron.train.loop import train

    original = checkpoint.check_pickles
    try:
        if unchecked:
            checkpoint.check_pickles = lambda folder: None
        return None if train(config) == 0 else "stopped"
    except UserError as error:
        return str(error)
    finally:
        checkpoint.check_pickles = original


@pytest.fixture(scope="module")
def stopped_run(ranks, tmp_path_factory):
    """A run's configuration by results folder, and a run that stands at step 2 of 4."""
    case = make_case(tmp_path_factory.mktemp("case"))
    whole = tmp_path_factory.mktemp("run") / "whole"

    def config(directory):
        return make_config(case, SFT, global_batch_size=3, max_steps=4, every=2, results_dir=str(directory), tp=2)

    assert ranks.run(resume, 2, config(whole), False) == [None, None]
    checkpoints = whole / "checkpoints"
    shutil.rmtree(checkpoints / "iter_0000004")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2\n")
    return config, whole


def resume_planted(ranks, stopped_run, tmp_path, plant, unchecked):
    config, whole = stopped_run
    shutil.copytree(whole, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "iter_0000002"
    plant(folder, Evil(tmp_path / "touched"))
    write_manifest(folder, 2, describe(f for f in folder.iterdir() if f.name != MANIFEST))  # as an attacker would
    return ranks.run(resume, 2, config(tmp_path / "run"), unchecked)


@by_name
def test_a_resumed_training_refuses(ranks, stopped_run, tmp_path, plant):
    errors = resume_planted(ranks, stopped_run, tmp_path, plant, False)
    assert all(refused(error) for error in errors), errors
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("plant", [plant_beside_a_good_index, plant_extra_state], ids=lambda f: f.__name__)
def test_without_the_check_it_would_have_run(ranks, stopped_run, tmp_path, plant):
    resume_planted(ranks, stopped_run, tmp_path, plant, True)
    assert (tmp_path / "touched").exists()
