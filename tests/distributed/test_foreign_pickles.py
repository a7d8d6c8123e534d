"""A checkpoint whose pickles would run a command is refused, in one line that names the command, before anything runs:
by a resumed training, by `verify` and by the offline conversion. Core's own loader does run it.

Planted are the index, the plain values, the extra state of modules, and ways around a check of them: an index that
sends its reader to another file than the checker's, or through a decoder. The manifest is written anew each time, as
whoever plants something would do."""

import dataclasses
import io
import os
import pickle
import shutil
import sys
import zlib
from types import ModuleType
from unittest.mock import patch

import numpy
import pytest
import torch
from fusion_case import SFT, make_case, make_config
from torch.distributed.checkpoint import filesystem

from fuserl_megatron import cli
from fuserl_megatron.checkpoint.manifest import MANIFEST, describe, write_manifest
from fuserl_megatron.checkpoint.reader import DistReader
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


def replace_state(folder, change):
    """Exchange the first extra state's place in the index for `change(place)`."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    key, place = next((k, p) for k, p in index.storage_data.items() if "_extra_state" in k.fqn)
    index.storage_data[key] = change(place)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def saved(evil):
    stream = io.BytesIO()
    torch.save([evil], stream)
    return stream.getvalue()


def plant_elsewhere(folder, evil, path):
    """A harmless file of the same name lies where a check of names would look."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(saved(evil))
    if not (folder / path.name).exists():
        (folder / path.name).write_bytes(saved(None))
    relative = str(path) if path.parent == folder.parent else f"{path.parent.name}/{path.name}"
    replace_state(folder, lambda place: dataclasses.replace(place, relative_path=relative, offset=0, length=10**4))


def plant_in_a_sub_folder(folder, evil):
    plant_elsewhere(folder, evil, folder / "sub" / "__9_0.distcp")


def plant_at_an_absolute_path(folder, evil):
    plant_elsewhere(folder, evil, folder.parent / "__9_0.distcp")


def plant_behind_a_link(folder, evil):
    (folder.parent / "away.distcp").write_bytes(saved(evil))
    (folder / "__9_0.distcp").symlink_to(folder.parent / "away.distcp")
    size = (folder / "__9_0.distcp").stat().st_size
    replace_state(folder, lambda p: dataclasses.replace(p, relative_path="__9_0.distcp", offset=0, length=size))


def plant_compressed(folder, evil):
    """What lies there is no pickle: only who decodes it first meets the command."""
    content = zlib.compress(saved(evil))
    (folder / "__9_0.distcp").write_bytes(content)
    replace_state(
        folder,
        lambda p: filesystem._StorageInfo("__9_0.distcp", 0, len(content), transform_descriptors=("zlib",)),
    )


def plant_fp8_state_of_another_dtype(folder, evil):
    content = pickle.dumps(evil)
    inner = torch.frombuffer(bytearray(content + bytes(-len(content) % 4)), dtype=torch.float32)
    plant_extra_state(folder, evil, [inner])


PLANTS = [
    plant_index,
    plant_beside_a_good_index,
    plant_common,
    plant_extra_state,
    plant_fp8_state,
    plant_storage_in_fp8_state,
    plant_fp8_state_of_another_dtype,
    plant_in_a_sub_folder,
    plant_at_an_absolute_path,
    plant_behind_a_link,
    plant_compressed,
]
IN_INDEX = [plant_index, plant_beside_a_good_index, *PLANTS[-4:]]
"""Refused when the index is read: also by the conversion, which opens no state."""
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
        seal(tmp_path / "bad" / "iter_0000000", 0)
        return tmp_path / "bad"

    return make


def seal(folder, iteration):
    """Write the manifest anew, as an attacker would."""
    names = (f for f in folder.iterdir() if f.is_file() and f.name != MANIFEST)
    write_manifest(folder, iteration, describe(names))


def refused(text, plant):
    said = {
        plant_in_a_sub_folder: "the index names 'sub/__9_0.distcp', no file beside it",
        plant_at_an_absolute_path: "__9_0.distcp', no file beside it",
        plant_behind_a_link: "__9_0.distcp: a link that leads out of the checkpoint",
        plant_compressed: "__9_0.distcp is compressed or encoded, which is not supported",
    }.get(plant)
    return (said or "names posix.system") in text and (said or "not opened") in text and "\n" not in text


@by_name
def test_verify_refuses(model, planted, tmp_path, plant, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "FUSERL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.main(["verify", str(model[0]), str(planted(plant)), "--max-new-tokens", "1"]) == 2
    assert refused(capsys.readouterr().err.rstrip("\n"), plant)
    assert not (tmp_path / "touched").exists()


@by_name
def test_offline_conversion_refuses_or_does_not_open_it(planted, tmp_path, plant, capsys):
    code = cli.main(["convert", "megatron-to-hf", str(planted(plant)), str(tmp_path / "out")])
    assert code == (2 if plant in IN_INDEX else 0)
    assert plant not in IN_INDEX or refused(capsys.readouterr().err.rstrip("\n"), plant)
    assert not (tmp_path / "touched").exists()


def test_honest_extra_state_passes(planted):
    folder = planted(plant_harmless_fp8_state) / "iter_0000000"
    key = next(k.fqn for k in pickle.loads((folder / ".metadata").read_bytes()).storage_data if "_extra_state" in k.fqn)
    with DistReader(folder) as reader:
        assert reader.read_object(key).dtype == torch.uint8


def resume(config):
    """The error of a run, or None."""
    from fuserl_megatron.train.loop import train
    from fuserl_megatron.util.errors import UserError

    try:
        return None if train(config) == 0 else "stopped"
    except UserError as error:
        return str(error)


def load_with_core(directory, folder):
    """What core makes of a checkpoint by itself."""
    from megatron.core import dist_checkpointing
    from plain_model import load_engine
    from torch.distributed.checkpoint.api import CheckpointException

    (chunk,) = load_engine(directory, 1, 1).target.chunks
    try:
        dist_checkpointing.load({"model": chunk.sharded_state_dict()}, folder)
    except (Exception, CheckpointException) as error:
        return str(error)


@pytest.fixture(scope="module")
def stopped_run(ranks, tmp_path_factory):
    """A run's configuration by results folder, and a run that stands at step 2 of 4."""
    case = make_case(tmp_path_factory.mktemp("case"))
    whole = tmp_path_factory.mktemp("run") / "whole"

    def config(directory):
        return make_config(case, SFT, global_batch_size=3, max_steps=4, every=2, results_dir=str(directory), tp=2)

    assert ranks.run(resume, 2, config(whole)) == [None, None]
    checkpoints = whole / "checkpoints"
    shutil.rmtree(checkpoints / "iter_0000004")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2\n")
    return config, whole


@by_name
def test_a_resumed_training_refuses(ranks, stopped_run, tmp_path, plant):
    config, whole = stopped_run
    shutil.copytree(whole, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "iter_0000002"
    plant(folder, Evil(tmp_path / "touched"))
    seal(folder, 2)
    errors = ranks.run(resume, 2, config(tmp_path / "run"))
    assert all(error and refused(error, plant) for error in errors), errors
    assert not (tmp_path / "touched").exists()


RUN_BY_CORE = [plant_beside_a_good_index, plant_extra_state, *PLANTS[-4:-1]]
"""Not the compressed one: torch's decoder for it is a package that is not here."""


@pytest.mark.parametrize("plant", RUN_BY_CORE, ids=lambda f: f.__name__)
def test_core_by_itself_runs_it(ranks, model, planted, tmp_path, plant):
    """The control: what is planted is a command that works."""
    folder = planted(plant) / "iter_0000000"
    ranks.run(load_with_core, 1, str(model[0]), str(folder))
    assert (tmp_path / "touched").exists()
