"""The learning rate over the steps: warm-up, shapes, and no step at a rate of 0."""

import math

import pytest

from fuserl_megatron.config.schema import OptimConfig, SchedConfig
from fuserl_megatron.train.schedule import lr_at


def rates(total, **sched):
    return [lr_at(step, total, OptimConfig(lr=2.0, sched=SchedConfig(**sched))) for step in range(total + 1)]


def test_warm_up_reaches_the_peak_and_the_shapes_fall_evenly_from_it():
    assert rates(7, name="linear", warmup_steps=2) == pytest.approx([1, 2, 5 / 3, 4 / 3, 1, 2 / 3, 1 / 3, 0])
    cosine = rates(3, name="cosine", warmup_ratio=0.0)
    assert cosine == pytest.approx([1 + math.cos(math.pi * done) for done in (1 / 4, 2 / 4, 3 / 4, 1)])
    assert rates(4, name="constant", warmup_steps=2) == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("total", [1, 3, 40])
def test_every_step_of_a_run_moves_the_weights_and_min_lr_comes_right_after_the_last(name, warmup, total):
    for min_lr in (0.0, 0.5):
        found = rates(total, name=name, warmup_steps=warmup, min_lr=min_lr)
        assert all(rate > min_lr for rate in found[:total])
        if warmup <= total:
            assert found[total] == pytest.approx(min_lr, abs=1e-12)
