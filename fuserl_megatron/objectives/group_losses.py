"""Stage-2 losses whose terms are not pairs: RLOO (all responses of a source), KTO (single ones), WRPO (triples).

Unreduced like the pair losses; the caller multiplies by the weights, sums and divides once by the global number of
prompts. Notation as in preference.py: h = log pi(y | x) - log pi_ref(y | x), summed over response tokens.

Weights: an RLOO response carries its source's w_k (the 1/N is inside the loss), a KTO response w_k divided by the
number of KTO responses of its source, a WRPO triple 1 (one a prompt). The weights of a prompt then sum to 1 in each
case (for RLOO: over its sources).

Shapes: N sequences (responses), U groups (the responses of one prompt from one source), P triples.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fuserl_megatron.objectives.preference import PAIR, SFT, PairLoss, Sides, implicit_rewards, log_two
from fuserl_megatron.objectives.spec import LossSpec, Unit, not_negative, positive, share


class ResponseLoss(NamedTuple):
    """Losses of single responses and their implicit rewards, which are detached and serve as metrics only."""

    losses_N: Tensor
    implicit_rewards_N: Tensor


def rloo(
    policy_logps_N: Tensor,
    advantages_N: Tensor,
    group_ids_N: Tensor,
    num_groups: int,
    *,
    reference_logps_N: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """Offline RLOO: l_n = -(1/N) A_n log pi(y_n) [+ (c/2) (h_n - mean h)^2 / (N - 1)], c = kl_coef.

    A_n is the leave-one-out advantage from `weights.rloo_advantages` (Ahmadian et al., arXiv 2402.14740), N the number
    of stored responses of the group. There is no importance ratio and no clip.

    The bracket is the KL term. Its sum over a group is c/2 times the unbiased sample variance of the log-ratios, whose
    gradient is exactly that of RLOO with the KL inside the reward, R_n = r_n - c h_n with h_n held constant: the
    leave-one-out baseline of h pulls siblings' log-ratios together. Unlike an average of h it is a valid regulariser
    on responses that the policy did not sample (Flet-Berliac et al., arXiv 2406.19185): its optimum is
    h_n = r_n / c + const within the group, the optimum of KL-regularised RL.

    Args:
        policy_logps_N: [N] log pi(y | x) summed over response tokens.
        advantages_N: [N] constants; 0 for a lone response.
        group_ids_N: [N] int64 in 0..num_groups-1; every response of a group is here (padding: a group of its own).
        num_groups: U.
        reference_logps_N: [N] log pi_ref(y | x); read only if kl_coef > 0.
        kl_coef: c >= 0, in reward units per nat.

    Returns:
        [N] losses; a group's sum is its loss.
    """
    dtype = policy_logps_N.dtype
    count_N = _group_sum(torch.ones_like(policy_logps_N), group_ids_N, num_groups)
    losses_N = -advantages_N.to(dtype) * policy_logps_N / count_N
    if kl_coef > 0.0:
        if reference_logps_N is None:
            raise ValueError("RLOO with kl_coef > 0 needs reference log-probabilities: score the reference model first")
        log_ratios_N = policy_logps_N - reference_logps_N
        deviations_N = log_ratios_N - _group_sum(log_ratios_N, group_ids_N, num_groups) / count_N
        losses_N = losses_N + 0.5 * kl_coef * deviations_N.square() / (count_N - 1.0).clamp(min=1.0)
    return losses_N


def _group_sum(values_N: Tensor, group_ids_N: Tensor, num_groups: int) -> Tensor:
    """Sum over each response's group, given back to every response, [N]."""
    return values_N.new_zeros(num_groups).index_add(0, group_ids_N, values_N)[group_ids_N]


def kto(
    policy_logps_N: Tensor,
    reference_logps_N: Tensor,
    desirable_N: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: a+ (1 - s(b (h - kl))) for a desirable response, a- (1 - s(b (kl - h))) for an undesirable one.

    Ethayarajh et al., arXiv 2402.01306. The implicit rewards are b h.

    Args:
        policy_logps_N: [N] log pi(y | x), summed.
        reference_logps_N: [N] log pi_ref(y | x), summed.
        desirable_N: [N] bool.
        kl: the reference point from `kto_kl`, one constant for the whole global batch, in nats, >= 0.
        beta: b > 0.
        desirable_weight: a+ >= 0.
        undesirable_weight: a- >= 0.

    Returns:
        [N] losses in [0, max(a+, a-)].
    """
    kl = kl.detach() if isinstance(kl, Tensor) else kl
    surplus_N = beta * (policy_logps_N - reference_logps_N - kl)
    # 1 - s(x) = s(-x), without the cancellation.
    good_N = desirable_weight * torch.sigmoid(-surplus_N)
    bad_N = undesirable_weight * torch.sigmoid(surplus_N)
    return torch.where(desirable_N, good_N, bad_N)


def kto_kl(policy_mismatched_logps_N: Tensor, reference_mismatched_logps_N: Tensor) -> Tensor:
    """KTO's reference point kl = max(0, mean h of mismatched (prompt, response) pairs); 0 if there are none.

    Args:
        policy_mismatched_logps_N: [N] log pi(y' | x), y' a response to another prompt; of the whole global batch.
        reference_mismatched_logps_N: [N] log pi_ref(y' | x).

    Returns:
        0-d float64, >= 0, in nats, detached.
    """
    log_ratios_N = (policy_mismatched_logps_N - reference_mismatched_logps_N).detach().double()
    return (log_ratios_N.sum() / max(log_ratios_N.numel(), 1)).clamp(min=0)


def wrpo(
    policy: Sides,
    reference: Sides,
    policy_source_logps_P: Tensor,
    reference_source_logps_P: Tensor,
    *,
    beta: float,
    alpha: float,
) -> PairLoss:
    """WRPO: -log s(b z), z = alpha h(y_ws) + (1 - alpha) h(y_wt) - h(y_l) (Yang et al., arXiv 2412.03187).

    Args:
        policy: [P] log pi of y_wt and y_l, the best and the worst of the target's own samples.
        reference: [P] log pi_ref of the same.
        policy_source_logps_P: [P] log pi of y_ws, the best response over all sources.
        reference_source_logps_P: [P] log pi_ref of y_ws.
        beta: b > 0 (the authors use 0.01).
        alpha: from `wrpo_alpha`; 0 is DPO on the target's own pair.

    Returns:
        PairLoss; implicit rewards b (alpha h(y_ws) + (1 - alpha) h(y_wt)) and b h(y_l).
    """
    own_P, rejected_P = implicit_rewards(policy, reference, 1.0)
    chosen_P = beta * (alpha * (policy_source_logps_P - reference_source_logps_P) + (1.0 - alpha) * own_P)
    rejected_P = beta * rejected_P
    return PairLoss(-logsigmoid(chosen_P - rejected_P), chosen_P.detach(), rejected_P.detach())


def wrpo_alpha(step: int, total_steps: int, alpha_end: float) -> float:
    """WRPO's weight of the source response: alpha_end * t / T, then alpha_end.

    Args:
        step: t, optimizer steps already taken (0 in the first step).
        total_steps: T > 0, optimizer steps over which alpha rises.
        alpha_end: final value in [0, 1] (the authors use 0.1).

    Returns:
        alpha in [0, alpha_end].
    """
    if total_steps < 1:
        raise ValueError(f"WRPO's alpha rises over total_steps = {total_steps}: it must be at least 1")
    return alpha_end * min(max(step, 0) / total_steps, 1.0)


def _rloo(
    policy_N: Tensor, reference_N: Tensor | None, advantages_N: Tensor, group_ids_N: Tensor, *, kl_coef: float
) -> ResponseLoss:
    losses_N = rloo(
        policy_N, advantages_N, group_ids_N, policy_N.numel(), reference_logps_N=reference_N, kl_coef=kl_coef
    )
    return ResponseLoss(losses_N, policy_N.detach() - (0.0 if reference_N is None else reference_N))


def _kto(
    policy_N: Tensor, reference_N: Tensor, desirable_N: Tensor, kl: float, *, beta: float, **weights: float
) -> ResponseLoss:
    losses_N = kto(policy_N, reference_N, desirable_N, kl, beta=beta, **weights)
    return ResponseLoss(losses_N, beta * (policy_N.detach() - reference_N))


def _kto_start(options: Mapping[str, Any]) -> float | None:
    weights = options["desirable_weight"], options["undesirable_weight"]
    return 0.5 * weights[0] if weights[0] == weights[1] else None


def _wrpo(
    policy: Sides,
    reference: Sides,
    source_policy_P: Tensor,
    source_reference_P: Tensor,
    alpha: float,
    *,
    beta: float,
    alpha_end: float,  # has become the step's alpha (`wrpo_alpha`)
) -> PairLoss:
    return wrpo(policy, reference, source_policy_P, source_reference_P, beta=beta, alpha=alpha)


# fmt: off
LOSSES = (
    LossSpec(name="kto", function=_kto, needs=(*PAIR, "desirable_N", "kl"), unit=Unit.SINGLE_RESPONSES,
             options={"beta": positive(0.1), "desirable_weight": not_negative(1.0),
                      "undesirable_weight": not_negative(1.0), **SFT},
             start=_kto_start),
    LossSpec(name="rloo", function=_rloo, needs=(*PAIR, "advantages_N", "group_ids_N"), unit=Unit.ALL_RESPONSES,
             options={"kl_coef": not_negative(0.0), **SFT}, reads_reference=lambda options: options["kl_coef"] > 0),
    LossSpec(name="wrpo", function=_wrpo, needs=(*PAIR, "source_policy", "source_reference", "alpha"),
             unit=Unit.TRIPLES, options={"beta": positive(0.01), "alpha_end": share(0.1), **SFT}, start=log_two),
)
# fmt: on
