"""From token log-probabilities to sequence log-probabilities, and log(1 - exp(x)) without loss of digits.

Shapes: T scored tokens (flat, over any number of rows), N sequences (responses).
"""

import torch
from torch import Tensor

LOG_HALF = -0.6931471805599453


def sequence_logps(token_logps_T: Tensor, sequence_ids_T: Tensor, num_sequences: int) -> Tensor:
    """Sum of the scored tokens' log-probabilities of each sequence: log pi(y | x) = sum_t log pi(y_t | x, y_<t).

    Accumulated in float64: preference losses take differences of such sums, and on a GPU the order of the
    atomic additions is then far below the digits anybody sees.

    Args:
        token_logps_T: [T] log-probabilities (natural log, any float type) of the scored tokens only.
        sequence_ids_T: [T] int64, the sequence each token belongs to, in 0..num_sequences-1, in any order.
        num_sequences: N. A sequence without a token here gets 0 (its tokens may be on another context-parallel rank).

    Returns:
        [N] float64 sums, differentiable also for T = 0.
    """
    zeros_N = token_logps_T.new_zeros(num_sequences, dtype=torch.float64)
    return zeros_N.index_add(0, sequence_ids_T, token_logps_T.double())


def mean_logps(logps_N: Tensor, lengths_N: Tensor) -> Tensor:
    """Per-token mean log pi(y | x) / |y|.

    Args:
        logps_N: [N] sums of log-probabilities (or of log-ratios).
        lengths_N: [N] scored tokens of the whole sequence. 0 counts as 1: a padding sequence gives 0, never 0/0.

    Returns:
        [N] in the type of logps_N.
    """
    return logps_N / lengths_N.clamp(min=1)


def log1mexp(x: Tensor) -> Tensor:
    """Compute log(1 - exp(x)) for x <= 0: log(-expm1(x)) near 0, log1p(-exp(x)) below log(1/2).

    x is capped at minus the machine epsilon of its type, so x = 0 (a probability that rounded to 1) gives a large
    negative number with gradient 0 instead of -inf and NaN.

    Args:
        x: log-probabilities, any shape.

    Returns:
        Same shape, finite.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near_zero = x > LOG_HALF
    near = torch.log(-torch.expm1(x))
    # Keep x near 0 away from this branch: where exp(x) rounds to 1 its infinite gradient would come through as NaN.
    far = torch.log1p(-torch.exp(torch.where(near_zero, LOG_HALF, x)))
    return torch.where(near_zero, near, far)
