"""Run-time invariants: each sees the mistake it is there for, says which name switches it off, and is silent then."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fuserl_megatron.config.schema import Config, ModelConfig, ObjectiveConfig, RunConfig, TrainerConfig
from fuserl_megatron.data.batch import IGNORE_INDEX, PackedBatch
from fuserl_megatron.objectives.spec import Unit

checks = pytest.importorskip("fuserl_megatron.train.checks")


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(checks, "any_rank", lambda flag, device: flag)


class Layout:
    rank, device = 3, torch.device("cpu")


def batch(**changes):
    """Two sequences of one prompt (3 + 2 and 3 + 1 tokens) in one row."""
    ignore = IGNORE_INDEX
    fields = dict(
        tokens_BS=torch.zeros(1, 9, dtype=torch.int64),
        labels_BS=torch.tensor([[ignore, ignore, 5, 6, ignore, ignore, 7, ignore, ignore]]),
        positions_BS=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 0]]),
        segment_ids_BS=torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1, -1]]),
        parent_ids_BS=torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1, -1]]),
        sequence_ids_BS=torch.tensor([[-1, -1, 0, 0, -1, -1, 1, -1, -1]]),
        lengths_N=torch.tensor([2, 1]),
        weights_N=torch.zeros(2, dtype=torch.float64),
        source_ids_N=torch.tensor([1, 1]),
        prompt_ids_N=torch.tensor([4, 4]),
        response_ids_N=torch.tensor([10, 11]),
        chosen_index_P=torch.tensor([1]),
        rejected_index_P=torch.tensor([0]),
        pair_weights_P=torch.ones(1, dtype=torch.float64),
        pair_source_ids_P=torch.tensor([1]),
    )
    return PackedBatch(**{**fields, **changes})


RLOO = dict(group_ids_N=torch.tensor([0, 0]), advantages_N=torch.tensor([0.25, -0.25], dtype=torch.float64))


@pytest.mark.parametrize(
    "name, unit, changes, words",
    [
        (
            "mask_coverage",
            None,
            dict(labels_BS=torch.full((1, 9), IGNORE_INDEX)),
            "response 10: 0 positions are scored",
        ),
        (
            "mask_coverage",
            None,
            dict(lengths_N=torch.tensor([2, 2])),
            "response 11: 1 positions are scored, it has 2 tokens",
        ),
        ("group_integrity", Unit.PAIRS, dict(prompt_ids_N=torch.tensor([4, 5])), "responses 11 and 10 are no pair"),
        ("group_integrity", Unit.PAIRS, dict(source_ids_N=torch.tensor([0, 1])), "are no pair"),
        ("group_integrity", Unit.PAIRS, dict(rejected_index_P=torch.tensor([1])), "are no pair"),
        (
            "group_integrity",
            Unit.TRIPLES,
            dict(source_index_P=torch.tensor([0]), prompt_ids_N=torch.tensor([1, 2])),
            "no pair",
        ),
        (
            "group_integrity",
            Unit.ALL_RESPONSES,
            RLOO | dict(group_ids_N=torch.tensor([0, 1])),
            "group of response 10 is not whole",
        ),
    ],
)
def test_a_broken_batch_is_seen(name, unit, changes, words):
    whole = batch(**(RLOO if unit is Unit.ALL_RESPONSES else {}))
    checks.check_batches(Config(), unit, [whole], Layout())
    broken = batch(**changes)
    with pytest.raises(
        checks.InvariantError, match=f"check {name}: rank 3, micro-batch 1, .*{words}.*disable_checks=.{name}."
    ):
        checks.check_batches(Config(), unit, [whole, broken], Layout())
    checks.check_batches(Config(run=RunConfig(disable_checks=(name,))), unit, [whole, broken], Layout())


def test_a_mask_that_covers_the_prompts_is_seen():
    labels = torch.tensor([[5, 6, 7, 8, 9, 10, 11, IGNORE_INDEX, IGNORE_INDEX]])
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1, -1]])
    # lengths that agree with the wrong mask: only the coverage gives it away
    wrong = batch(labels_BS=labels, sequence_ids_BS=ids, lengths_N=torch.tensor([4, 3]))
    with pytest.raises(checks.InvariantError, match="every position is scored"):
        checks.check_batches(Config(), None, [wrong], Layout())


class Prepared:
    dataset, response_ids = SimpleNamespace(place="in.jsonl:{}".format), np.array([4, 5, 6])
    unit, num_prompts, group_ids = None, 2, np.array([7, 9])
    sequence_offsets = pair_offsets = np.array([0, 2, 3])
    weights = np.array([0.25, 0.75, 1.0])
    pair_weights = np.zeros(3)
    source_ids = np.array([0, 1, 1])


def test_weights_that_do_not_sum_to_one_are_seen():
    checks.check_prepared(Config(), Prepared())
    wrong = Prepared()
    wrong.unit = Unit.PAIRS
    with pytest.raises(checks.InvariantError, match="in.jsonl:4: prompt 7: weights sum to 0.0, not 1"):
        checks.check_prepared(Config(), wrong)
    whole = Prepared()  # three responses of one source: its weight stands at each
    whole.unit, whole.source_ids, whole.weights = Unit.ALL_RESPONSES, np.array([0, 0, 1]), np.ones(3)
    checks.check_prepared(Config(), whole)


@pytest.mark.parametrize("loss, value", [("dpo", math.log(2)), ("hinge", 1.0), ("ipo", 25.0), ("kto", 0.5)])
def test_the_first_loss_has_its_analytic_value(loss, value):
    config = Config(
        model=ModelConfig(path="m"),
        trainer=TrainerConfig(precision="32"),
        objective=ObjectiveConfig(
            stage="fusepo",
            loss=loss,
            beta=0.1,
            rpo_alpha=0.0,
            **(dict(desirable_weight=1.0, undesirable_weight=1.0) if loss == "kto" else {}),
        ),
    )
    checks.first_step_check(config, 0)(value * (1 + 5e-4))
    with pytest.raises(checks.InvariantError, match="first_step_loss: policy and reference are the same model"):
        checks.first_step_check(config, 0)(value * 1.01)
    checks.first_step_check(config, 1)(value * 2)  # only the first step
    other = replace(config, objective=replace(config.objective, reference="elsewhere"))
    checks.first_step_check(other, 0)(value * 2)
    checks.first_step_check(replace(config, run=RunConfig(disable_checks=("first_step_loss",))), 0)(value * 2)
