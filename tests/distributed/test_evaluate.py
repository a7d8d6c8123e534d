"""`fuserl evaluate` and the reference pass: figures of a float64 twin, and a cache that training only looks up."""

import json

import pytest
from fusion_case import DPO, SFT, make_case, make_config, twin


def evaluated(config, before=None):
    from fuserl_megatron.train.evaluate import evaluate

    return evaluate(config, before)


def scored(config):
    from fuserl_megatron.train.evaluate import score_reference

    return score_reference(config)


def trained_without_scoring(config):
    from fuserl_megatron.train import reference
    from fuserl_megatron.train.loop import train

    score, reference.score = reference.score, None  # the pass has been done: training looks up, and fails here if not
    try:
        return train(config)
    finally:
        reference.score = score


def test_figures_are_the_twins_and_a_scored_reference_is_found(ranks, tmp_path):
    case = make_case(tmp_path)
    config, elsewhere = (make_config(case, DPO, tp=2, results_dir=str(tmp_path / name)) for name in ("run", "figures"))
    assert ranks.run(evaluated, 2, elsewhere, case["reference"]) == [0, 0]
    assert ranks.run(scored, 2, config) == [0, 0]
    assert ranks.run(trained_without_scoring, 2, config) == [0, 0]
    found = json.loads((tmp_path / "figures" / "evaluation.json").read_text())
    for objective in (SFT, DPO):
        expected, _ = twin(case, objective)
        assert found[objective["stage"]]["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["fusepo"]["loss"] != pytest.approx(found["fusesft"]["loss"], rel=1e-2)
    before = found["before"]
    assert before["model"] == case["reference"]
    expected, _ = twin(case | {"policy": case["reference"]}, SFT)
    assert before["fusesft"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert before["fusepo"]["loss"] == pytest.approx(0.6931472, rel=1e-5)  # it is the reference itself


def test_the_table_is_aligned_and_has_five_digits():
    from fuserl_megatron.train.evaluate import table

    name = "nll_per_token/qwen2.5-72b-instruct"
    after, before = {"loss": 1 / 3, name: 5.560623603277765, "prompts": 40}, {"loss": 2 / 3, name: float("nan")}
    assert table({"fusesft": [after, before | {"prompts": 40}]}) == [
        f"{'':<42}   before    after  difference",
        f"{'fusesft loss':<42}  0.66667  0.33333    -0.33333",
        f"fusesft {name}      nan   5.5606         nan",
        f"{'fusesft prompts':<42}       40       40           0",
    ]
    assert table({"fusepo": [after]})[1].split() == ["fusepo", "loss", "0.33333"]
