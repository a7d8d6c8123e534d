"""Numbers that are not finite are named by both directions of the conversion and by verify, and copied as they are."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from convert.conftest import make_config, make_weights, write_model

from fuserl_megatron.convert.copying import all_finite
from fuserl_megatron.convert.offline import hf_to_megatron, megatron_to_hf
from fuserl_megatron.proofs.verify import compare_tensors
from fuserl_megatron.proofs.verify_sides import open_side


def test_all_finite():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        numbers = torch.zeros(1001, dtype=dtype)
        assert all_finite(numbers) and all_finite(numbers[:0])
        for value in (float("nan"), float("inf"), -float("inf")):
            for place in (0, 500, 1000):
                bad = numbers.clone()
                bad[place] = value
                assert not all_finite(bad), (dtype, value, place)
    assert all_finite(torch.ones(3, dtype=torch.bool)) and all_finite(torch.ones(3).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_the_conversion_and_verify_name_them(tmp_path, capfd, value):
    config = make_config()
    weights = make_weights(config)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    weights["model.embed_tokens.weight"][52, 47] = value
    write_model(tmp_path / "hf", config, weights)
    checkpoint = hf_to_megatron(tmp_path / "hf", tmp_path / "m")
    names = "2 tensors hold NaN or infinity: model.embed_tokens.weight, model.layers.1.mlp.up_proj.weight"
    assert capfd.readouterr().err == f"WARNING: {tmp_path / 'hf'}: {names}\n"
    back = megatron_to_hf(checkpoint, tmp_path / "back")
    assert capfd.readouterr().err == f"WARNING: {checkpoint / 'iter_0000000'}: {names}\n"
    found = compare_tensors(open_side(checkpoint), open_side(back))
    expected = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
    assert found["same"] and found["not_finite"] == {"a": expected, "b": expected}
    assert (back / "model.safetensors").stat().st_size and capfd.readouterr().err == ""
