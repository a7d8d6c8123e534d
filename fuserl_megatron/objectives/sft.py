"""FuseSFT: the weighted negative log-likelihood and its three reductions (stage 1 of FuseRL, arXiv 2504.06562).

    L = (1 / normalizer) * sum_i losses_i,   i over every response of every prompt of the global batch

The contract: `sft_losses` gives one term per response, weight included. Sum the terms over the responses at hand,
divide ONCE by the global normaliser, never by a local count; losses and gradients of micro-batches and ranks add up.
`data.sampler.StepPlan.normalizer` counts it over the global batch before the step.

    reduction             term i                       normaliser
    token_mean            w_i * NLL_i / T_i            number of prompts        (default)
    token_sum             w_i * NLL_i                  number of prompts        the literal likelihood
    weighted_token_mean   w_i * NLL_i                  sum_i w_i * T_i          ordinary SFT when all weights agree

Shapes: N sequences (responses).
"""

from enum import StrEnum

from torch import Tensor

from fuserl_megatron.objectives.logps import mean_logps


class SftReduction(StrEnum):
    """How the tokens of a response and the responses of a batch are averaged."""

    TOKEN_MEAN = "token_mean"
    TOKEN_SUM = "token_sum"
    WEIGHTED_TOKEN_MEAN = "weighted_token_mean"


def sft_losses(logps_N: Tensor, lengths_N: Tensor, weights_N: Tensor, reduction: str | SftReduction) -> Tensor:
    """Weighted loss term of each response, to be summed and divided once by the global normaliser.

    Args:
        logps_N: [N] summed log-probabilities of the scored tokens (-NLL).
        lengths_N: [N] scored tokens T of each response.
        weights_N: [N] weights w, summing to 1 per prompt; 0 for padding.
        reduction: an SftReduction or its name (ValueError for any other).

    Returns:
        [N] losses in the type of logps_N.
    """
    nll_N = -logps_N
    if SftReduction(reduction) is SftReduction.TOKEN_MEAN:
        nll_N = mean_logps(nll_N, lengths_N)
    return weights_N.to(nll_N.dtype) * nll_N
