"""`fuserl evaluate` and the reference pass: figures of a float64 twin, and a cache that training only looks up."""

import json

import pytest
from fusion_case import DPO, SFT, make_case, make_config, twin


def evaluated(config):
    from fuserl_megatron.train.evaluate import evaluate

    return evaluate(config)


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
    assert ranks.run(evaluated, 2, elsewhere) == [0, 0]
    assert ranks.run(scored, 2, config) == [0, 0]
    assert ranks.run(trained_without_scoring, 2, config) == [0, 0]
    found = json.loads((tmp_path / "figures" / "evaluation.json").read_text())
    for objective in (SFT, DPO):
        expected, _ = twin(case, objective)
        assert found[objective["stage"]]["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["fusepo"]["loss"] != pytest.approx(found["fusesft"]["loss"], rel=1e-2)
