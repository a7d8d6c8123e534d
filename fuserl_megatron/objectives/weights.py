"""From rewards to weights: how much each source (or response) of a prompt counts.

Every function is batched: the named dimensions are the last ones and any number of dimensions may lead, so one call
serves a whole data set ([G, K, N]) as well as one prompt ([K, N]). All results are float64: this is done once per data
set, on the CPU, and a softmax at a temperature of 0.01 deserves the digits.

Entries outside a mask are never read: they may be NaN. Entries inside a mask must be finite (ValueError otherwise).

Shapes: G prompts (groups), K sources, N responses of a source, R responses of a pool (top-M selection).
"""

import math

import torch
from torch import Tensor


def source_scores(rewards_KN: Tensor, mask_KN: Tensor | None = None, aggregation: str = "max") -> Tensor:
    """One score per source: the best (or the mean) reward of its responses.

    s_k = max_n r(x, y[k, n]) (the reviewed FuseRL text), or the mean over n.

    Args:
        rewards_KN: [..., K, N] rewards, in the reward model's units.
        mask_KN: [..., K, N] bool, True where a response with a reward exists; None for all.
        aggregation: "max" or "mean".

    Returns:
        [..., K] float64 scores; -inf where a source has no response (an absent source).
    """
    rewards_KN, mask_KN = _rewards_and_mask(rewards_KN, mask_KN)
    if aggregation == "max":
        return rewards_KN.masked_fill(~mask_KN, -math.inf).amax(dim=-1)
    if aggregation == "mean":
        count_K = mask_KN.sum(dim=-1)
        mean_K = rewards_KN.sum(dim=-1) / count_K.clamp(min=1)
        return mean_K.masked_fill(count_K == 0, -math.inf)
    raise ValueError(f"score aggregation {aggregation!r} is unknown: use 'max' or 'mean'")


def source_weights(scores_K: Tensor, present_K: Tensor | None, reward_temperature: float) -> Tensor:
    """Softmax of the scores over the sources that are present.

    w_k = exp(s_k / tau) / sum_j exp(s_j / tau), j over the sources present (FuseRL, arXiv 2504.06562).
    tau = inf gives equal weights; tau = 0 the best source alone, tied best sources sharing equally: the limits.

    Args:
        scores_K: [..., K] scores, in the rewards' units.
        present_K: [..., K] bool; None means every source whose score is not -inf.
        reward_temperature: tau >= 0, in the rewards' units; 0 and inf are the two limits above.

    Returns:
        [..., K] float64 weights: 0 for absent sources, summing to 1 per prompt, or to 0 if no source is present.

    Raises:
        ValueError: tau is negative or NaN, or the score of a present source is not finite.
    """
    tau = float(reward_temperature)
    if not tau >= 0.0:  # also refuses NaN
        raise ValueError(f"reward_temperature = {tau}: it must be 0 (best source), a positive number or inf (uniform)")
    if present_K is None:
        present_K = scores_K != -math.inf
    scores_K, present_K = _rewards_and_mask(scores_K, present_K, what="score")
    best = scores_K.masked_fill(~present_K, -math.inf).amax(dim=-1, keepdim=True)
    gap_K = torch.where(present_K, scores_K - best, 0.0)  # <= 0; the shift makes any finite reward scale safe
    if tau == 0.0:
        unnormalized_K = (gap_K == 0.0) & present_K
    else:
        unnormalized_K = torch.where(present_K, torch.exp(gap_K / tau), 0.0)
    total = unnormalized_K.sum(dim=-1, keepdim=True, dtype=torch.float64)
    return unnormalized_K / total.masked_fill(total == 0.0, 1.0)


def top_m_mask(rewards_R: Tensor, m: int, mask_R: Tensor | None = None) -> Tensor:
    """The M highest-reward responses of a pool; equal rewards at the cut: the lower index is kept.

    `source_weights` of the rewards with this mask gives the selected responses the softmax of their own rewards / tau.

    Args:
        rewards_R: [..., R] rewards of all responses of all sources of a prompt (flatten [K, N] to get the pool).
        m: how many to keep (>= 1); a pool with fewer keeps all it has.
        mask_R: [..., R] bool, True where a response exists; None for all.

    Returns:
        [..., R] bool, at most m True per prompt.
    """
    if m < 1:
        raise ValueError(f"top_m = {m}: it must be at least 1 (the paper's reviewed version uses 4)")
    rewards_R, mask_R = _rewards_and_mask(rewards_R, mask_R)
    order_R = rewards_R.masked_fill(~mask_R, -math.inf).argsort(dim=-1, descending=True, stable=True)
    rank_R = order_R.argsort(dim=-1)
    return (rank_R < m) & mask_R


def effective_number_of_sources(weights_K: Tensor) -> Tensor:
    """exp(H(w)), H the entropy in nats: 1 for a single source, K for equal weights, 0 for an empty prompt.

    Args:
        weights_K: [..., K] weights summing to 1 (or all 0).

    Returns:
        [...] float64.
    """
    weights_K = weights_K.double()
    number = torch.special.entr(weights_K).sum(dim=-1).exp()
    return torch.where(weights_K.sum(dim=-1) > 0, number, 0.0)


def standardize(rewards_GKN: Tensor, mask_GKN: Tensor | None = None, over: str = "prompt") -> Tensor:
    """Rewards to mean 0 and standard deviation 1 (population), per prompt or over the whole data set.

    r' = (r - mean) / std. Where all rewards are equal (std 0) the result is 0, so that the weights come out uniform.
    The temperature is then in units of that standard deviation.

    Args:
        rewards_GKN: [..., K, N] rewards.
        mask_GKN: [..., K, N] bool, True where a response exists; None for all.
        over: "prompt" (over the last two dimensions) or "dataset" (over everything given).

    Returns:
        float64 of the same shape, 0 outside the mask.
    """
    if over not in ("prompt", "dataset"):
        raise ValueError(f"reward standardisation over {over!r} is unknown: use 'prompt' or 'dataset'")
    rewards_GKN, mask_GKN = _rewards_and_mask(rewards_GKN, mask_GKN)
    start = -2 if over == "prompt" else 0
    rows = rewards_GKN.flatten(start)
    mask = mask_GKN.flatten(start)
    deviations = centered(rows, mask)
    count = mask.sum(dim=-1, keepdim=True).clamp(min=1)
    std = (deviations.square().sum(dim=-1, keepdim=True) / count).sqrt()
    return (deviations / std.masked_fill(std == 0.0, 1.0)).reshape(rewards_GKN.shape)


def rloo_advantages(rewards_N: Tensor, mask_N: Tensor | None = None) -> Tensor:
    """Leave-one-out advantages inside one source: A_n = r_n - mean_{m != n} r_m (RLOO, arXiv 2402.14740).

    Computed as N / (N - 1) * (r_n - mean r), the same number. Equal rewards and N = 1 give exactly 0.

    Args:
        rewards_N: [..., N] rewards of one source's responses.
        mask_N: [..., N] bool, True where a response exists; None for all.

    Returns:
        [..., N] float64, 0 outside the mask; the sum over n is 0.
    """
    rewards_N, mask_N = _rewards_and_mask(rewards_N, mask_N)
    count = mask_N.sum(dim=-1, keepdim=True)
    return centered(rewards_N, mask_N) * count / (count - 1).clamp(min=1)


def best_and_worst_indices(rewards_N: Tensor, mask_N: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the highest and the lowest reward inside each source (ties: the lowest index).

    Args:
        rewards_N: [..., N] rewards.
        mask_N: [..., N] bool, True where a response exists; None for all.

    Returns:
        best [...] int64, worst [...] int64, has_pair [...] bool. has_pair is False where fewer than two responses
        exist or all rewards are equal; best is still right there as long as one response exists, worst too.
    """
    rewards_N, mask_N = _rewards_and_mask(rewards_N, mask_N)
    high_N = rewards_N.masked_fill(~mask_N, -math.inf)
    low_N = rewards_N.masked_fill(~mask_N, math.inf)
    return high_N.argmax(dim=-1), low_N.argmin(dim=-1), high_N.amax(dim=-1) > low_N.amin(dim=-1)


def reward_gaps(chosen_rewards_P: Tensor, rejected_rewards_P: Tensor) -> Tensor:
    """Gaps dr = r+ - r- in [0, 1] ([P] float64), MaPPO's calibration of a pair (arXiv 2507.21183).

    Raises:
        ValueError: a gap lies outside [0, 1].
    """
    gaps_P = chosen_rewards_P.double() - rejected_rewards_P.double()
    if not bool(((gaps_P >= 0) & (gaps_P <= 1)).all()):
        raise ValueError("MaPPO needs reward gaps in [0, 1]: scale the rewards to [0, 1] before building the data set")
    return gaps_P


def _rewards_and_mask(rewards: Tensor, mask: Tensor | None, what: str = "reward") -> tuple[Tensor, Tensor]:
    """Rewards as float64 with 0 outside the mask, and the mask as bool."""
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    rewards = torch.where(mask, rewards.double(), 0.0)
    if not bool(rewards.isfinite().all()):
        raise ValueError(f"a {what} is NaN or infinite: drop that response (mask it) before computing weights")
    return rewards, mask


def centered(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards minus their masked mean over the last dimension, exactly 0 where all are equal; 0 outside the mask.

    The largest reward is taken off first: equal rewards then are exact zeros, and a large offset costs no digits.
    """
    best = rewards.masked_fill(~mask, -math.inf).amax(dim=-1, keepdim=True)
    shifted = torch.where(mask, rewards - best, 0.0)
    mean = shifted.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(mask, shifted - mean, 0.0)
