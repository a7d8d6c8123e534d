"""A reference model that gives NaN: every rank ends with the same line, and none waits for rank 0."""

import pytest
from fusion_case import DPO, make_case, make_config
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    paths = make_case(tmp_path_factory.mktemp("case"), num_prompts=4)
    file = f"{paths['reference']}/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return paths


def refused(config):
    from fuserl_megatron.config.schema import UserError
    from fuserl_megatron.train.loop import train

    try:
        return train(config)
    except UserError as error:
        return str(error)


def test_nan_in_the_reference_ends_every_rank(ranks, case, tmp_path):
    config = make_config(case, DPO, global_batch_size=2, results_dir=str(tmp_path / "run"))
    first, second = ranks.run(refused, 2, config)
    assert first == second and "\n" not in first
    assert "non-finite log-probability for responses [" in first and "trainer.precision=32" in first
