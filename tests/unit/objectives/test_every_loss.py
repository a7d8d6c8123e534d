"""Every loss of the table is held everywhere: golden value, gradcheck, layouts, docs/math.md. And its sign is right."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fusion_case import DPO
from fusion_case import LOSSES as LAYOUT_CASES
from loss_cases import CASES

from fuserl_megatron.objectives import LOSSES
from fuserl_megatron.objectives.preference import PAIR, PairLoss, implicit_rewards
from fuserl_megatron.objectives.spec import LossSpec, positive
from fuserl_megatron.objectives.terms import preference_terms
from fuserl_megatron.testing.losses import check_loss

REQUIRED = {"cdpo": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}
NOT_MONOTONIC = ("apo_down", "discopop")
"""APO-down lowers the chosen response too; DiscoPOP, found by search, rises around a margin of 0."""
MATH = (Path(__file__).resolve().parents[3] / "docs" / "math.md").read_text(encoding="utf-8")
HELPERS = {"sft_term", "kto_kl", "wrpo_alpha", "fused_reference"}
"""Functions in the table of losses that are part of one."""

# The pair of docs/math.md; a third response (the triple's source response) with -9 / -12 and 4 tokens.
GOLDEN = {
    "dpo": (dict(beta=0.1), [0.5981388693815918]),
    "ln_dpo": (dict(beta=10.0), [0.05488217915807815]),
    "cdpo": (dict(beta=0.1, label_smoothing=0.1), [0.6181388693815918]),
    "robust": (dict(beta=0.1, label_smoothing=0.1), [0.5731388693815918]),
    "hinge": (dict(beta=0.1), [0.8]),
    "ipo": (dict(beta=0.1), [22.20765625]),
    "simpo": (dict(beta=10.0, gamma_beta_ratio=0.3), [2.753335355532678]),
    "cpo": (dict(beta=0.1, cpo_alpha=1.0), [2.8789183613555425]),
    "orpo": (dict(beta=0.1), [2.567629287527701]),
    "exo": (dict(beta=0.1, label_smoothing=0.001), [2.4220146206616477]),
    "discopop": (dict(beta=0.05, discopop_tau=0.05), [0.8737921186731876]),
    "apo_zero": (dict(beta=0.1), [0.9500727581720401]),
    "apo_down": (dict(beta=0.1), [0.9626633991717324]),
    "nca": (dict(beta=0.1), [1.3381679959146955]),
    "bco": (dict(beta=0.1, delta=0.25), [1.3111541217815443]),
    "sppo": (dict(beta=0.1), [32.5]),
    "mpo": (dict(beta=0.1, preference_weight=0.8, bco_weight=0.2, rpo_alpha=1.0), [3.2363944346658373]),
    "mappo": (dict(beta=0.1), [0.6503539066627487]),
    "infifpo": (dict(beta=2.5), [1.4417384203592727]),
    "wrpo": (dict(beta=0.1), [0.5869620020497037]),
    "kto": (dict(beta=0.1), [0.49375032550048964, 0.4563613127629212, 0.4316800165217519]),
    "rloo": (dict(kl_coef=0.2), [2.0847222222222226, -4.8277777777777775, 1.0222222222222224]),
}


def batch():
    """The responses that GOLDEN is about."""

    def column(*values):
        return torch.tensor(values, dtype=torch.float64)

    return SimpleNamespace(
        policy_logps_N=column(-12.5, -20.25, -9.0),
        reference_logps_N=column(-13.0, -18.75, -12.0),
        lengths_N=torch.tensor([5, 8, 4]),
        chosen_index_P=torch.tensor([0]),
        rejected_index_P=torch.tensor([1]),
        source_index_P=torch.tensor([2]),
        reward_gaps_P=column(0.25),
        source_chosen_mean_logps_PK=column(-2.0, -3.0)[None],
        source_rejected_mean_logps_PK=column(-2.0, -2.5)[None],
        source_present_PK=torch.ones(1, 2, dtype=torch.bool),
        desirable_N=torch.tensor([True, False, True]),
        advantages_N=column(0.5, -0.75, 0.25),
        group_ids_N=torch.zeros(3, dtype=torch.int64),
        best_N=torch.tensor([True, False, False]),
    )


def losses_of(spec, options):
    given = batch()
    return preference_terms(spec, spec.complete(options), given.policy_logps_N, given, alpha=0.1, kl=0.25).losses_I


def named_in_math():
    """The functions in the last column of the table of losses."""
    table = MATH.split("## Stage 2")[1].split("\n\n|")[1].split("\n\n")[0]
    return set(re.findall(r"`(\w+)` ?(?:,[^|]*)?\|$", table, re.MULTILINE))


def test_every_loss_has_a_golden_value_a_gradcheck_a_layout_case_and_a_line_in_math_md():
    losses = set(LOSSES)
    assert set(GOLDEN) == losses
    assert {loss for loss, _ in CASES.values()} == {name for name, spec in LOSSES.items() if spec.unit.compares}
    assert {case["loss"] for case in (DPO, *LAYOUT_CASES.values())} == losses
    assert named_in_math() - HELPERS == losses


@pytest.mark.parametrize("loss", GOLDEN)
def test_golden_values_through_the_table(loss):
    options, expected = GOLDEN[loss]
    torch.testing.assert_close(
        losses_of(LOSSES[loss], options), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_the_right_sign_gradient_and_start(loss):
    check_loss(LOSSES[loss], REQUIRED.get(loss, {}), monotonic=loss not in NOT_MONOTONIC)


@pytest.mark.parametrize("loss", NOT_MONOTONIC)
def test_a_loss_that_is_not_monotonic_is_none(loss):
    """The exception is needed: it hides nothing that would pass."""
    with pytest.raises(AssertionError, match=f"loss {loss}: it rises when a chosen response gets likelier"):
        check_loss(LOSSES[loss])


def apo_zero(policy, reference, *, beta, sign=1.0):
    """APO-zero: 1 - s(b h+) + s(b h-) (arXiv 2408.06266). With sign -1, both sigmoids the wrong way round."""
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    losses_P = 1 - torch.sigmoid(sign * chosen_P) + torch.sigmoid(sign * rejected_P)
    return PairLoss(losses_P, chosen_P.detach(), rejected_P.detach())


def planted(function, start=1.0):
    return LossSpec(
        name="apo_zero", function=function, needs=PAIR, options={"beta": positive(0.1)}, start=lambda options: start
    )


def test_a_new_loss_with_the_right_sign_passes():
    check_loss(planted(apo_zero))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (planted(lambda *x, beta: apo_zero(*x, beta=beta, sign=-1.0)), "rises when a chosen response gets likelier"),
        (planted(lambda p, r, beta: apo_zero(p[::-1], r[::-1], beta=beta)), "rises when a chosen"),
        (planted(lambda *x, beta: apo_zero(*x, beta=beta)._replace(losses_P=x[0][0].detach() * 0)), "not require grad"),
        (planted(apo_zero, start=0.5), "while policy == reference it is"),
        (planted(lambda *x, beta: PairLoss(*(v.sum() for v in apo_zero(*x, beta=beta)))), "losses, not"),
        (planted(lambda p, r, beta: apo_zero(p, r, beta=beta)._replace(chosen_implicit_rewards_P=p[0])), "detached"),
        (
            planted(lambda *x, beta: PairLoss(*(apo_zero(*x, beta=beta)[i] for i in (0, 2, 1)))),
            "its margin has the wrong sign",
        ),
    ],
)
def test_a_planted_mistake_is_seen(spec, words):
    with pytest.raises((AssertionError, RuntimeError), match=words):
        check_loss(spec)
