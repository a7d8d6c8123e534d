"""FusePO's losses on pairs, one function per loss, unreduced (stage 2 of FuseRL, arXiv 2504.06562).

    L = (1 / #prompts) * sum_x sum_k w_k * l(x, Y_k)

The functions give l per pair. The caller multiplies by the pair's source weight w_k (outside the sigmoid), sums over
the pairs at hand and divides once by the number of prompts of the global batch.

Notation: h+ = log pi(y+) - log pi_ref(y+) and h- likewise for the rejected response, summed over response tokens; a bar
is a per-token mean; s is the sigmoid; b is beta. An NLL beside a loss is always the mean over the response's tokens.

Shapes: P pairs, K sources. All inputs and results are [P] unless said otherwise.
"""

from typing import NamedTuple

from torch import Tensor

from fuserl_megatron.objectives.logps import log_sigmoid, mean_logps


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


def dpo(
    policy_chosen_logps_P: Tensor,
    policy_rejected_logps_P: Tensor,
    reference_chosen_logps_P: Tensor,
    reference_rejected_logps_P: Tensor,
    *,
    beta: float,
) -> PairLoss:
    """DPO: -log s(b (h+ - h-)) (arXiv 2305.18290, eq. 7).

    Args:
        policy_chosen_logps_P: [P] log pi(y+ | x), summed over response tokens.
        policy_rejected_logps_P: [P] log pi(y- | x).
        reference_chosen_logps_P: [P] log pi_ref(y+ | x).
        reference_rejected_logps_P: [P] log pi_ref(y- | x).
        beta: b > 0, per nat of sequence log-ratio.

    Returns:
        PairLoss; implicit rewards b h.
    """
    chosen_P = beta * (policy_chosen_logps_P - reference_chosen_logps_P)
    rejected_P = beta * (policy_rejected_logps_P - reference_rejected_logps_P)
    return PairLoss(-log_sigmoid(chosen_P - rejected_P), chosen_P.detach(), rejected_P.detach())


def ln_dpo(
    policy_chosen_logps_P: Tensor,
    policy_rejected_logps_P: Tensor,
    reference_chosen_logps_P: Tensor,
    reference_rejected_logps_P: Tensor,
    chosen_lengths_P: Tensor,
    rejected_lengths_P: Tensor,
    *,
    beta: float,
) -> PairLoss:
    """Length-normalised DPO: -log s(b (h+/|y+| - h-/|y-|)) (FuseChat-3.0, arXiv 2503.04222).

    Args:
        policy_chosen_logps_P: [P] log pi(y+ | x), summed.
        policy_rejected_logps_P: [P] log pi(y- | x), summed.
        reference_chosen_logps_P: [P] log pi_ref(y+ | x), summed.
        reference_rejected_logps_P: [P] log pi_ref(y- | x), summed.
        chosen_lengths_P: [P] |y+|, scored tokens.
        rejected_lengths_P: [P] |y-|.
        beta: b > 0, per nat of mean token log-ratio (the authors use 10).

    Returns:
        PairLoss; implicit rewards b h / |y|.
    """
    chosen_P = beta * mean_logps(policy_chosen_logps_P - reference_chosen_logps_P, chosen_lengths_P)
    rejected_P = beta * mean_logps(policy_rejected_logps_P - reference_rejected_logps_P, rejected_lengths_P)
    return PairLoss(-log_sigmoid(chosen_P - rejected_P), chosen_P.detach(), rejected_P.detach())
