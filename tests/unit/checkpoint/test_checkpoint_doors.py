"""What is asked of a checkpoint or model before it is read: its manifest, layers that the files can hold, a reference
of the target's architecture."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from convert.conftest import make_config, write_model

from fuserl_megatron.checkpoint.manifest import MANIFEST, find_damage
from fuserl_megatron.config.schema import Config, ModelConfig, ObjectiveConfig
from fuserl_megatron.convert.hf_io import check_weights
from fuserl_megatron.convert.offline import hf_to_megatron, megatron_to_hf
from fuserl_megatron.proofs.verify_sides import open_side
from fuserl_megatron.train.feed import open_run
from fuserl_megatron.util.errors import UserError


@pytest.fixture
def model(tmp_path):
    write_model(tmp_path / "hf", make_config())
    return tmp_path / "hf", hf_to_megatron(tmp_path / "hf", tmp_path / "m")


def test_a_conversion_writes_the_manifest_that_training_looks_at(model):
    assert find_damage(model[1] / "iter_0000000", 0) is None
    assert find_damage(model[1] / "iter_0000000", 1) == "manifest.json is of step 0"


def test_without_a_manifest_it_is_taken_with_one_line_unless_a_run_wrote_it(model, tmp_path, capfd):
    folder = model[1] / "iter_0000000"
    (folder / MANIFEST).unlink()
    for read in (lambda: megatron_to_hf(model[1], tmp_path / "back"), lambda: open_side(model[1])):
        capfd.readouterr()
        read()
        warning = f"WARNING: {folder}: no manifest.json, so its files cannot be checked for damage\n"
        assert capfd.readouterr().err == warning
    (folder / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="damaged checkpoint: manifest.json is missing"):
        megatron_to_hf(model[1], tmp_path / "again")


def test_layers_that_no_file_holds_are_refused_at_once(model, tmp_path):
    for config in (model[0] / "config.json", model[1] / "hf" / "config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2**31 - 1}))
    started = time.monotonic()
    for read in (
        lambda: check_weights(model[0]),  # train, evaluate, parity, and a dry run
        lambda: hf_to_megatron(model[0], tmp_path / "x"),
        lambda: megatron_to_hf(model[1], tmp_path / "y"),
        lambda: open_side(model[0]),
        lambda: open_side(model[1]),
    ):
        with pytest.raises(UserError, match="num_hidden_layers = 2147483647, but there are"):
            read()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("change", "said"),
    [({"rms_norm_eps": 1e-6}, "its rms_norm_eps is 1e-06"), ({"rope_theta": 5e5}, "its rope is"), ({}, None)],
)
def test_a_reference_is_of_the_target_s_architecture(model, tmp_path, change, said):
    write_model(tmp_path / "reference", make_config(**change))
    run = Config(
        model=ModelConfig(path=str(model[0])), objective=ObjectiveConfig(reference=str(tmp_path / "reference"))
    )
    if said is None:
        assert open_run(replace(run), [])[1].num_layers == 2
        return
    with pytest.raises(UserError, match="must have the target's architecture") as caught:
        open_run(run, [])
    assert said in str(caught.value)
