"""The proofs of tests/distributed on one CUDA device with NCCL. `make test-gpu`; skipped where torch sees no GPU."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    from fusion_case import make_case

    # head dimension 64 and multiples of 16: what the GPU kernels of every back end accept
    fields = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    return make_case(tmp_path_factory.mktemp("case"), scale=1.5, **fields)


def without_tf32(function, *args):
    torch.backends.cuda.matmul.allow_tf32 = False
    return function(*args)


def implementations():
    from fuserl_megatron.mcore.model import have_transformer_engine

    return ["local", "transformer_engine"] if have_transformer_engine() else ["local"]


@pytest.mark.parametrize("stage", ["fusesft", "fusepo"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_fp32_gradients_equal_the_float64_twin(ranks, case, tmp_path, stage, implementation):
    import dataclasses

    from fusion_case import DPO, SFT, loss_and_gradients, make_config, twin, worst_relative_error

    if implementation not in implementations():
        pytest.skip("Transformer Engine is not installed")
    objective = SFT if stage == "fusesft" else DPO
    config = make_config(case, objective)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, transformer_impl=implementation))
    ((loss, _, norm, grads, _),) = ranks.run(without_tf32, 1, loss_and_gradients, config, str(tmp_path / "reference"))
    expected, expected_grads = twin(case, objective)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert worst_relative_error(grads, expected_grads) <= 1e-3


@pytest.mark.parametrize("distopt", [False, True])
def test_bf16_training_learns_and_exports(ranks, case, tmp_path, distopt):
    from fusion_case import SFT, make_config
    from test_resume_and_export import losses, run

    config = make_config(case, SFT, max_steps=30, results_dir=str(tmp_path), precision="bf16", distopt=distopt, lr=2e-3)
    assert ranks.run(run, 1, config) == [0]
    seen = losses(tmp_path)
    assert all(math.isfinite(v) for pair in seen.values() for v in pair)
    assert seen[30][0] < 0.7 * seen[1][0]
    assert (tmp_path / "hf" / "model.safetensors").is_file()
