"""A reference model that gives NaN: every rank ends with the same line, and none waits for rank 0."""

import re
from pathlib import Path

import pytest
from fusion_case import DPO, SFT, make_case, make_config
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
    from fuserl_megatron.train.loop import train
    from fuserl_megatron.util.errors import UserError

    try:
        return train(config)
    except UserError as error:
        return str(error)


def test_nan_in_the_reference_ends_every_rank(ranks, case, tmp_path):
    config = make_config(case, DPO, global_batch_size=2, results_dir=str(tmp_path / "run"))
    first, second = ranks.run(refused, 2, config)
    assert first == second and "\n" not in first
    assert "non-finite log-probability for responses [" in first and "trainer.precision=32" in first
    assert "/records.jsonl:" in first  # a response's number is no address


def printed(config, evaluates):
    import contextlib
    import io

    from fuserl_megatron.train.evaluate import evaluate
    from fuserl_megatron.train.loop import train

    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = evaluate(config) if evaluates else train(config)
    return code, out.getvalue()


@pytest.mark.parametrize("evaluates", [False, True], ids=["train", "evaluate"])
def test_a_loss_that_is_not_finite_names_file_and_line(ranks, case, tmp_path, evaluates):
    broken = case | {"policy": case["reference"]}
    tokenizer = Path(case["policy"]) / "tokenizer.json"
    (Path(case["reference"]) / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    config = make_config(broken, SFT, global_batch_size=2, results_dir=str(tmp_path / "run"))
    ((code, text),) = ranks.run(printed, 1, config, evaluates)
    assert code == 1 and "the loss is not finite" in text
    lines = (Path(case["data"]).parent / "records.jsonl").read_text().splitlines()
    named = re.findall(r"of (\w+) \(\S+records.jsonl:(\d+)\)", text)
    assert named
    for source, line in named:
        assert f'"source": "{source}"' in lines[int(line) - 1]
