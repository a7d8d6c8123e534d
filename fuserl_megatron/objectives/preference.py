"""FusePO's losses on pairs, one function per loss, unreduced (stage 2 of FuseRL, arXiv 2504.06562).

    L = (1 / #prompts) * sum_x sum_k w_k * l(x, Y_k)

The functions give l per pair. The caller multiplies by the pair's source weight w_k (outside the sigmoid), sums over
the pairs at hand and divides once by the number of prompts of the global batch. Pair losses that also hold each side's
own likelihood stand in absolute.py, KTO, RLOO and WRPO, whose terms are not pairs, in group_losses.py, InfiFPO in
infifpo.py. What the trainer has to know of each loss is at the end of the file: LOSSES. A loss is added by writing its
function here and its line there.

Notation: h+ = log pi(y+ | x) - log pi_ref(y+ | x) and h- likewise for the rejected response, both summed over response
tokens; a bar is a per-token mean; s is the sigmoid; b is beta. An NLL beside a loss is always the mean over the
response's tokens, so that its coefficient means the same for long and short responses.

Arguments, the same for all functions, one entry per pair (P pairs) and each a (chosen, rejected) pair of tensors:
    policy, reference    log pi and log pi_ref of the whole response, in nats, the first with gradient
    lengths              scored tokens |y+|, |y-| (int)
    beta                 > 0; per nat of the sequence (summed losses) or of the mean token (length-normalised ones)
All return a PairLoss with [P] tensors.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fuserl_megatron.objectives.logps import log1mexp, mean_logps
from fuserl_megatron.objectives.spec import LossSpec, not_negative, open_share, positive, share, switch

Sides = tuple[Tensor, Tensor]
"""(chosen, rejected), [P] each."""


class PairLoss(NamedTuple):
    """Losses of pairs and the two implicit rewards, which are detached and serve as metrics only."""

    losses_P: Tensor
    chosen_implicit_rewards_P: Tensor
    rejected_implicit_rewards_P: Tensor

    @property
    def margins_P(self) -> Tensor:
        """Chosen minus rejected implicit reward, [P]."""
        return self.chosen_implicit_rewards_P - self.rejected_implicit_rewards_P

    @property
    def accuracies_P(self) -> Tensor:
        """1 where the chosen response is preferred strictly, else 0 (a tie, as at the first step, counts 0), [P]."""
        return (self.margins_P > 0).to(self.losses_P.dtype)


def implicit_rewards(policy: Sides, reference: Sides, beta: float, lengths: Sides | None = None) -> Sides:
    """The implicit rewards b h of both sides; b h / |y| with lengths."""
    log_ratios = [logps_P - reference_P for logps_P, reference_P in zip(policy, reference, strict=True)]
    if lengths is not None:
        log_ratios = list(map(mean_logps, log_ratios, lengths))
    chosen_P, rejected_P = (beta * log_ratios_P for log_ratios_P in log_ratios)
    return chosen_P, rejected_P


def dpo(policy: Sides, reference: Sides, *, beta: float) -> PairLoss:
    """DPO: -log s(b (h+ - h-)) (Rafailov et al., arXiv 2305.18290, eq. 7). Implicit rewards b h."""
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    return PairLoss(-logsigmoid(chosen_P - rejected_P), chosen_P.detach(), rejected_P.detach())


def ln_dpo(policy: Sides, reference: Sides, lengths: Sides, *, beta: float) -> PairLoss:
    """Length-normalised DPO: -log s(b (h+/|y+| - h-/|y-|)), the authors' own choice with b = 10.

    Source: FuseChat-3.0 (arXiv 2503.04222). Implicit rewards b h / |y|. Not the sum scaled by one common length: each
    response is divided by its own.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta, lengths)
    return PairLoss(-logsigmoid(chosen_P - rejected_P), chosen_P.detach(), rejected_P.detach())


def cdpo(policy: Sides, reference: Sides, *, beta: float, label_smoothing: float) -> PairLoss:
    """Conservative DPO: -(1 - e) log s(b d) - e log s(-b d), d = h+ - h-, e = label_smoothing in [0, 0.5).

    The cross-entropy when a share e of the preferences is flipped (Mitchell, note on DPO with noisy preferences, 2023).
    e = 0 is DPO. Implicit rewards b h.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    logits_P = chosen_P - rejected_P
    losses_P = -(1.0 - label_smoothing) * logsigmoid(logits_P) - label_smoothing * logsigmoid(-logits_P)
    return PairLoss(losses_P, chosen_P.detach(), rejected_P.detach())


def robust(policy: Sides, reference: Sides, *, beta: float, label_smoothing: float) -> PairLoss:
    """Robust DPO: [-(1 - e) log s(b d) + e log s(-b d)] / (1 - 2 e), d = h+ - h-, e = label_smoothing in [0, 0.5).

    Its expectation over labels flipped with probability e is the clean DPO loss (Chowdhury et al., arXiv 2403.00409);
    it can be negative. e = 0 is DPO. Implicit rewards b h.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    logits_P = chosen_P - rejected_P
    numerator_P = -(1.0 - label_smoothing) * logsigmoid(logits_P) + label_smoothing * logsigmoid(-logits_P)
    return PairLoss(numerator_P / (1.0 - 2.0 * label_smoothing), chosen_P.detach(), rejected_P.detach())


def hinge(policy: Sides, reference: Sides, *, beta: float) -> PairLoss:
    """Hinge: max(0, 1 - b (h+ - h-)) (SLiC's loss on log-ratios, arXiv 2305.10425 and 2309.06657).

    The gradient is 0 once the margin is 1 or more. Implicit rewards b h.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    return PairLoss(torch.relu(1.0 - (chosen_P - rejected_P)), chosen_P.detach(), rejected_P.detach())


def ipo(policy: Sides, reference: Sides, lengths: Sides, *, beta: float, length_normalized: bool) -> PairLoss:
    """IPO: (g+ - g- - 1 / (2 b))^2 with g = h / |y| (length_normalized) or g = h.

    Source: Azar et al., arXiv 2310.12036. The paper sums; TRL takes the per-token mean. Implicit rewards b g.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, 1.0, lengths if length_normalized else None)
    losses_P = (chosen_P - rejected_P - 1.0 / (2.0 * beta)).square()
    return PairLoss(losses_P, beta * chosen_P.detach(), beta * rejected_P.detach())


def exo(policy: Sides, reference: Sides, *, beta: float, label_smoothing: float) -> PairLoss:
    """EXO on a pair: q log(q / (1 - e)) + (1 - q) log((1 - q) / e), q = s(b (h+ - h-)), e = label_smoothing > 0.

    The reverse Kullback-Leibler divergence from (1 - e, e), where cDPO has the forward one (Ji et al., arXiv
    2402.00856, eq. 16). The margin goes towards log((1 - e) / e). Implicit rewards b h.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    logits_P = chosen_P - rejected_P
    won_P = torch.sigmoid(logits_P) * (logsigmoid(logits_P) - math.log1p(-label_smoothing))
    lost_P = torch.sigmoid(-logits_P) * (logsigmoid(-logits_P) - math.log(label_smoothing))
    return PairLoss(won_P + lost_P, chosen_P.detach(), rejected_P.detach())


def discopop(policy: Sides, reference: Sides, *, beta: float, discopop_tau: float) -> PairLoss:
    """DiscoPOP: -(1 - m) log s(z) + m e^-z, z = b (h+ - h-), m = s(z / tau), tau = discopop_tau in (0, 1].

    A loss found by search (Lu et al., arXiv 2406.08414, eq. 5; b = tau = 0.05). It is not monotonic: with that tau it
    rises with z between -0.12 and 0.07, so that its first steps push the margin down. Implicit rewards b h.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    logits_P = chosen_P - rejected_P
    logistic_P = -logsigmoid(logits_P) * torch.sigmoid(-logits_P / discopop_tau)
    # m e^-z in one exponent: for a large negative z the one factor is 0 and the other infinite.
    exponential_P = torch.exp(logsigmoid(logits_P / discopop_tau) - logits_P)
    return PairLoss(logistic_P + exponential_P, chosen_P.detach(), rejected_P.detach())


def mappo(policy: Sides, reference: Sides, reward_gaps_P: Tensor, *, beta: float) -> PairLoss:
    """MaPPO: -log s(b h+ - dr b h-), dr = r+ - r- in [0, 1] from `weights.reward_gaps` (arXiv 2507.21183).

    The closer the two rewards, the less the rejected response is pushed down; dr = 1 is DPO. Implicit rewards b h.
    """
    chosen_P, rejected_P = implicit_rewards(policy, reference, beta)
    losses_P = -logsigmoid(chosen_P - reward_gaps_P.to(chosen_P.dtype) * rejected_P)
    return PairLoss(losses_P, chosen_P.detach(), rejected_P.detach())


def simpo(policy: Sides, lengths: Sides, *, beta: float, gamma: float) -> PairLoss:
    """SimPO: -log s(b log pi(y+)/|y+| - b log pi(y-)/|y-| - gamma), no reference.

    Source: Meng et al., arXiv 2405.14734. gamma >= 0 is the absolute target margin; recipes give gamma / b. Implicit
    rewards b log pi(y) / |y|.
    """
    chosen_P, rejected_P = (beta * means_P for means_P in map(mean_logps, policy, lengths))
    return PairLoss(-logsigmoid(chosen_P - rejected_P - gamma), chosen_P.detach(), rejected_P.detach())


def cpo(policy: Sides, lengths: Sides, *, beta: float, cpo_alpha: float) -> PairLoss:
    """CPO: -log s(b (log pi(y+) - log pi(y-))) + cpo_alpha * NLL(y+) / |y+|, no reference.

    Source: Xu et al., arXiv 2401.08417. The preference term takes sums. Implicit rewards b log pi(y).
    """
    chosen_P, rejected_P = (beta * logps_P for logps_P in policy)
    nll_P = sft_term(policy[0], lengths[0], rpo_alpha=cpo_alpha)
    return PairLoss(-logsigmoid(chosen_P - rejected_P) + nll_P, chosen_P.detach(), rejected_P.detach())


def orpo(policy: Sides, lengths: Sides, *, beta: float) -> PairLoss:
    """ORPO: NLL(y+)/|y+| - b log s(z), z = (a+ - a-) - (log(1 - e^a+) - log(1 - e^a-)), a = log pi(y)/|y|.

    z is the log of the odds ratio; no reference (Hong et al., arXiv 2403.07691). Implicit rewards b a.
    """
    chosen_P, rejected_P = map(mean_logps, policy, lengths)
    log_odds_P = (chosen_P - rejected_P) - (log1mexp(chosen_P) - log1mexp(rejected_P))
    losses_P = -chosen_P - beta * logsigmoid(log_odds_P)
    return PairLoss(losses_P, beta * chosen_P.detach(), beta * rejected_P.detach())


def sft_term(policy_chosen_logps_P: Tensor, chosen_lengths_P: Tensor, *, rpo_alpha: float) -> Tensor:
    """SFT term to add to a loss: rpo_alpha * NLL(y+) / |y+| (Pang et al., arXiv 2404.19733). Returns [P]."""
    return -rpo_alpha * mean_logps(policy_chosen_logps_P, chosen_lengths_P)


def _simpo(policy: Sides, lengths: Sides, *, beta: float, gamma_beta_ratio: float) -> PairLoss:
    """SimPO with gamma given as recipes give it, divided by beta."""
    return simpo(policy, lengths, beta=beta, gamma=beta * gamma_beta_ratio)


def log_two(options: object) -> float:
    """What the DPO family starts from: -log s(0)."""
    return math.log(2.0)


def _exo_start(options: Mapping[str, Any]) -> float:
    """-log 2 - log(e (1 - e)) / 2."""
    noise = options["label_smoothing"]
    return -math.log(2.0) - 0.5 * (math.log(noise) + math.log1p(-noise))


PAIR = ("policy", "reference")
SFT = {"rpo_alpha": not_negative(0.0)}
NOISE = {"label_smoothing": share(None, below=0.5)}
# Defaults are published settings (docs/math.md, conf/); beta differs by three orders of magnitude between the losses
# and is therefore never shared.
# fmt: off
LOSSES = (
    LossSpec(name="dpo", function=dpo, needs=PAIR, options={"beta": positive(0.01), **SFT}, start=log_two),
    LossSpec(name="ln_dpo", function=ln_dpo, needs=(*PAIR, "lengths"), options={"beta": positive(10.0), **SFT},
             start=log_two),
    LossSpec(name="cdpo", function=cdpo, needs=PAIR, options={"beta": positive(0.01), **NOISE, **SFT}, start=log_two),
    LossSpec(name="robust", function=robust, needs=PAIR, options={"beta": positive(0.01), **NOISE, **SFT},
             start=log_two),
    LossSpec(name="hinge", function=hinge, needs=PAIR, options={"beta": positive(0.01), **SFT},
             start=lambda options: 1.0),
    LossSpec(name="ipo", function=ipo, needs=(*PAIR, "lengths"),
             options={"beta": positive(0.1), "length_normalized": switch(True), **SFT},
             start=lambda options: (1.0 / (2.0 * options["beta"])) ** 2),
    LossSpec(name="simpo", function=_simpo, needs=("policy", "lengths"),
             options={"beta": positive(10.0), "gamma_beta_ratio": not_negative(0.3), **SFT}),
    LossSpec(name="cpo", function=cpo, needs=("policy", "lengths"),
             options={"beta": positive(0.1), "cpo_alpha": not_negative(1.0)}),
    LossSpec(name="orpo", function=orpo, needs=("policy", "lengths"), options={"beta": positive(0.1)}),
    LossSpec(name="exo", function=exo, needs=PAIR,
             options={"beta": positive(0.1), "label_smoothing": open_share(1e-3, below=0.5), **SFT}, start=_exo_start),
    LossSpec(name="discopop", function=discopop, needs=PAIR,
             options={"beta": positive(0.05), "discopop_tau": open_share(0.05), **SFT},
             start=lambda options: 0.5 * math.log(2.0) + 0.5),
    LossSpec(name="mappo", function=mappo, needs=(*PAIR, "reward_gaps_P"), options={"beta": positive(0.01), **SFT},
             start=log_two),
)
# fmt: on
