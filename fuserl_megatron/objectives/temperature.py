"""The temperature by a rule: from the spread of the sources' scores and from how often the reward ranks them rightly.

    tau = 0.83 s_r cot(pi (A - 1/2))

docs/math.md derives it ("Why softmax, and which tau") and says where it ends. Here are the rule, the spread s_r, and
what two measurements of the accuracy A need: labelled pairs, and the agreement of two reward models.

Shapes: G prompts (groups), K sources.
"""

import math

from torch import Tensor

from fuserl_megatron.objectives.weights import centered

CONSTANT = 0.83
"""sqrt(2) / 1.702, to two digits: 1.702 is the slope at which the logistic function is nearest to the normal one."""
NORMAL_95 = 1.959963984540054


def rule_temperature(accuracy: float, score_deviation: float) -> float:
    """Tau = 0.83 s_r cot(pi (A - 1/2)): 0 (the best source alone) at A = 1, growing without bound towards A = 1/2.

    Args:
        accuracy: A, the share of pairs (responses of one prompt, from two sources) that the scores rank rightly.
        score_deviation: s_r >= 0 of `within_prompt_deviation`, in the rewards' units; so is tau.

    Raises:
        ValueError: A is not in (1/2, 1], or s_r is negative or not finite.
    """
    if not 0.5 < accuracy <= 1.0:
        raise ValueError(f"accuracy {accuracy:g}: the rule needs one above 0.5 (a coin's) and at most 1")
    if not 0.0 <= score_deviation < math.inf:
        raise ValueError(f"score deviation {score_deviation:g}: it must be finite and not negative")
    if accuracy == 1.0:
        return 0.0  # the tangent of the nearest float to pi / 2 is not infinite
    return CONSTANT * score_deviation / math.tan(math.pi * (accuracy - 0.5))


def within_prompt_deviation(scores_GK: Tensor) -> float:
    """s_r, the standard deviation of the sources' scores within a prompt.

    s_r^2 is the mean of the prompts' sample variances, sum_k (s_k - mean)^2 / (n - 1) over the n sources present.
    Prompts with one source or none have no variance and are left out.

    Args:
        scores_GK: [G, K] scores; -inf where a source is absent.

    Returns:
        s_r in the scores' units; NaN where no prompt has two sources.
    """
    deviations_GK, count_G = _deviations(scores_GK)
    return float((deviations_GK.square().sum(dim=1) / (count_G - 1)).mean().sqrt())


def score_correlation(scores_GK: Tensor, other_GK: Tensor) -> tuple[float, int]:
    """How far two reward models agree on which source is better: the correlation of their scores within prompts.

    The sum of the products of the deviations from each prompt's mean, over all prompts with at least two sources,
    divided by the root of the two sums of squares.

    Args:
        scores_GK: [G, K] scores by one model; -inf where a source is absent.
        other_GK: [G, K] by the other, in any units; the same sources are absent.

    Returns:
        The correlation, NaN where either model's scores never differ; and its degrees of freedom, sum of (n - 1).
    """
    (one_GK, count_G), (other_GK, _) = _deviations(scores_GK), _deviations(other_GK)
    one_GK, other_GK = (values / values.abs().max().clamp(min=1e-300) for values in (one_GK, other_GK))  # no overflow
    sizes = one_GK.square().sum() * other_GK.square().sum()
    return float((one_GK * other_GK).sum() / sizes.sqrt()), int((count_G - 1).sum())


def accuracy_of_agreement(correlation: float) -> float:
    """A of two equally good reward models with independent errors: 1/2 + asin(sqrt(correlation)) / pi.

    The correlation is then lambda, the share of quality in the scores' variance. At or below 0 it is 1/2, a coin's.
    """
    return 0.5 + math.asin(math.sqrt(min(max(correlation, 0.0), 1.0))) / math.pi


def correlation_interval(correlation: float, degrees_of_freedom: int) -> tuple[float, float]:
    """95 % interval of a correlation within groups (Fisher); (-1, 1) below 3 degrees of freedom."""
    if degrees_of_freedom < 3:
        return -1.0, 1.0
    if abs(correlation) >= 1.0:
        return correlation, correlation
    half = NORMAL_95 / math.sqrt(degrees_of_freedom - 2)
    return math.tanh(math.atanh(correlation) - half), math.tanh(math.atanh(correlation) + half)


def share_interval(share: float, number: int) -> tuple[float, float]:
    """95 % interval of a share that was counted in `number` >= 1 independent cases (Wilson)."""
    z2 = NORMAL_95**2
    middle = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / number + z2 / (4 * number**2)) / (1 + z2 / number)
    return (0.0 if share == 0.0 else middle - half), (1.0 if share == 1.0 else middle + half)


def _deviations(scores_GK: Tensor) -> tuple[Tensor, Tensor]:
    """[H, K] deviations from the prompt's mean (0 where absent) and [H] sources, of the H prompts with at least two."""
    present_GK = scores_GK != -math.inf
    count_G = present_GK.sum(dim=1)
    several_G = count_G > 1
    return centered(scores_GK.double(), present_GK)[several_G], count_G[several_G]
