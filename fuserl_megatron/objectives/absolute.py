"""Losses on pairs that also say where each response's own likelihood goes, not only the difference of the two.

DPO fixes the margin h+ - h- and leaves open whether both rise or both fall. Here each side has a term of its own: the
chosen response goes up (or, APO-down, down), the rejected one goes down, or each towards a value.

Notation, arguments and results as in preference.py: b is beta, h = log pi - log pi_ref, s the sigmoid. Implicit rewards
are b h throughout.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from fuserl_megatron.objectives.preference import PAIR, SFT, PairLoss, Sides, implicit_rewards
from fuserl_megatron.objectives.spec import LossSpec, not_negative, number, positive


def apo_zero(policy: Sides, reference: Sides, *, beta: float) -> PairLoss:
    """APO-zero: 1 - s(b h+) + s(b h-), for chosen responses better than what the model writes itself.

    Source: D'Oosterlinck et al., arXiv 2408.06266, eq. 7. Up with the chosen, down with the rejected response.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    # 1 - s(x) = s(-x), without the cancellation.
    losses_P = torch.sigmoid(-chosen_P) + torch.sigmoid(rejected_P)
    return PairLoss(losses_P, chosen_P.detach(), rejected_P.detach())


def apo_down(policy: Sides, reference: Sides, *, beta: float) -> PairLoss:
    """APO-down: s(b h+) + 1 - s(b (h+ - h-)), for chosen responses worse than what the model writes itself.

    Source: the same, eq. 8. Both go down, the rejected response further. The gradient on h+ has either sign, and is 0
    while policy == reference.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    losses_P = torch.sigmoid(chosen_P) + torch.sigmoid(rejected_P - chosen_P)
    return PairLoss(losses_P, chosen_P.detach(), rejected_P.detach())


def nca(policy: Sides, reference: Sides, *, beta: float) -> PairLoss:
    """NCA on a pair: -log s(b h+) - (log s(-b h+) + log s(-b h-)) / 2 (Chen et al., arXiv 2402.05369).

    b h+ goes towards log 2 and no further, so that the chosen response does not lose likelihood; b h- goes down.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    losses_P = -logsigmoid(chosen_P) - 0.5 * logsigmoid(-chosen_P) - 0.5 * logsigmoid(-rejected_P)
    return PairLoss(losses_P, chosen_P.detach(), rejected_P.detach())


def bco(policy: Sides, reference: Sides, *, beta: float, delta: float) -> PairLoss:
    """BCO on a pair: -log s(b h+ - delta) - log s(-(b h- - delta)) (Jung et al., arXiv 2404.04656).

    A classifier of good and bad whose logit is the implicit reward. The paper's delta is a running mean of the rewards
    seen so far; here it is a constant of the run (0 is TRL's bco_pair), for a running mean would be a state that every
    rank and every resumed run must share, and a micro-batch does not see the batch that it is of.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    losses_P = -logsigmoid(chosen_P - delta) - logsigmoid(delta - rejected_P)
    return PairLoss(losses_P, chosen_P.detach(), rejected_P.detach())


def sppo(policy: Sides, reference: Sides, *, beta: float) -> PairLoss:
    """SPPO with hard labels: (h+ - 1/(2b))^2 + (h- + 1/(2b))^2, b = 1 / eta (Wu et al., arXiv 2405.00675, eq. 4.7).

    The paper's probability of winning is taken to be 1 for the chosen and 0 for the rejected response. Each log-ratio
    has a target of its own, half of IPO's margin on either side of 0.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, 1.0)
    target = 0.5 / beta
    losses_P = (chosen_P - target).square() + (rejected_P + target).square()
    return PairLoss(losses_P, beta * chosen_P.detach(), beta * rejected_P.detach())


def mpo(
    policy: Sides, reference: Sides, *, beta: float, preference_weight: float, bco_weight: float, delta: float
) -> PairLoss:
    """MPO: preference_weight DPO + bco_weight BCO (Wang et al., arXiv 2411.10442).

    Its third term, the NLL of the chosen response, is the SFT term: the option rpo_alpha, per token as everywhere.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    quality_P = bco(policy, reference, beta=beta, delta=delta).losses_P
    losses_P = -preference_weight * logsigmoid(chosen_P - rejected_P) + bco_weight * quality_P
    return PairLoss(losses_P, chosen_P.detach(), rejected_P.detach())


def _bco_start(options: Mapping[str, Any]) -> float:
    """-log s(-delta) - log s(delta)."""
    size = abs(options["delta"])
    return size + 2.0 * math.log1p(math.exp(-size))


def _mpo_start(options: Mapping[str, Any]) -> float:
    return options["preference_weight"] * math.log(2.0) + options["bco_weight"] * _bco_start(options)


# fmt: off
LOSSES = (
    LossSpec(name="apo_zero", function=apo_zero, needs=PAIR, options={"beta": positive(0.1), **SFT},
             start=lambda options: 1.0),
    LossSpec(name="apo_down", function=apo_down, needs=PAIR, options={"beta": positive(0.1), **SFT},
             start=lambda options: 1.0),
    LossSpec(name="nca", function=nca, needs=PAIR, options={"beta": positive(0.01), **SFT},
             start=lambda options: 2.0 * math.log(2.0)),
    LossSpec(name="bco", function=bco, needs=PAIR, options={"beta": positive(0.1), "delta": number(0.0), **SFT},
             start=_bco_start),
    LossSpec(name="sppo", function=sppo, needs=PAIR, options={"beta": positive(0.001), **SFT},
             start=lambda options: 0.5 / options["beta"] ** 2),
    LossSpec(name="mpo", function=mpo, needs=PAIR,
             options={"beta": positive(0.1), "preference_weight": positive(0.8), "bco_weight": not_negative(0.2),
                      "delta": number(0.0), "rpo_alpha": not_negative(1.0)},
             start=_mpo_start),
)
# fmt: on
