"""The cost model against the published rows; the benchmarks' own formulas."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cost_model  # noqa: E402
from _turns import ratio  # noqa: E402


def errors(fit):
    return [abs(cost_model.tokens_per_second(row, fit) / row.published - 1) for row in cost_model.ROWS]


def test_cost_model_is_near_every_published_row():
    fit = cost_model.fit_to(cost_model.ROWS)
    found = errors(fit)
    assert sum(found) / len(found) < 0.10 and max(found) < 0.20
    left_out = [
        abs(
            cost_model.tokens_per_second(row, cost_model.fit_to([r for r in cost_model.ROWS if r is not row]))
            / row.published
            - 1
        )
        for row in cost_model.ROWS
    ]
    assert max(left_out) < 0.20
    # negative control: the bound can be missed
    assert max(errors(replace(fit, gemm=1.0))) > 0.20


def test_cost_model_knows_its_physics():
    fit = cost_model.Fit(0.5, 0.3)
    job = cost_model.ROWS[2]
    parts = cost_model.step_seconds(job, fit)
    work = sum(parts[name] for name in ("products", "attention", "traffic", "tensor", "context"))
    assert parts["bubble"] == pytest.approx(work * 7 / (5 * 128))  # 8 stages, 5 virtual, 128 micro-batches
    assert cost_model.step_seconds(replace(job, vpp=1), fit)["bubble"] == pytest.approx(5 * parts["bubble"])
    assert cost_model.step_seconds(replace(job, tp=1, gpus=16), fit)["tensor"] == 0
    assert cost_model.MODELS["8B"].parameters == pytest.approx(8.03e9, rel=2e-3)
    assert cost_model.MODELS["405B"].parameters == pytest.approx(405.9e9, rel=2e-3)


def test_ratio_is_of_turns_not_of_sums():
    above, below = dict(wall=[2.0, 4.0, 30.0], cpu=[3.0, 3.0, 3.0]), dict(wall=[1.0, 2.0, 10.0], cpu=[1.0, 2.0, 1.0])
    found = ratio(above, below, 0.5)
    assert (found["median"], found["min"], found["max"]) == (1.0, 1.0, 1.5)
    assert (found["of_minima"], found["cpu"]) == (1.0, 1.5)
