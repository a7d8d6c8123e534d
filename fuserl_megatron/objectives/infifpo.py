"""InfiFPO: length-normalised DPO against a reference fused from the sources' own probabilities (arXiv 2505.13878).

The per-source log-probabilities are a column of the data set: each comes from that source with its own tokenizer, so
they cannot be computed here, and only their per-token means are comparable between models.

Readings taken where the published text leaves room: M_i in the max-margin rule is the clipped value c_i; the
confidence weights are the softmax of the c_i, i.e. geometric-mean token probabilities normalised over the sources.

Shapes: P pairs, K sources.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fuserl_megatron.objectives.logps import mean_logps
from fuserl_megatron.objectives.preference import PAIR, SFT, PairLoss, Sides
from fuserl_megatron.objectives.spec import LossSpec, choice, positive


def fused_reference(
    source_mean_logps_PK: Tensor, source_present_PK: Tensor, initial_mean_logps_P: Tensor, *, chosen: bool, fusion: str
) -> Tensor:
    """Per-token mean log-probability of the fused reference, f(y).

    Each source is first clipped against the initial target: c_i = max(bar_i, bar_init) for a chosen response,
    min(bar_i, bar_init) for a rejected one, so that a source can only strengthen the preference. Then
        max_margin   f = c_i at argmax_i |c_i - bar_init| (ties: lowest index)
        mean         f = mean_i c_i
        confidence   f = sum_i softmax(c)_i c_i
    over the sources present; without any, f = bar_init.

    Args:
        source_mean_logps_PK: [P, K] bar_i in nats per token of source i's tokenizer; never read where absent.
        source_present_PK: [P, K] bool.
        initial_mean_logps_P: [P] bar_init, of the initial target (the reference model).
        chosen: whether these are the chosen responses.
        fusion: "max_margin", "mean" or "confidence" (ValueError for any other).

    Returns:
        [P].
    """
    initial_P1 = initial_mean_logps_P.unsqueeze(-1)
    # An absent source takes the target's own value: its margin is 0, and the masks below keep it out of the means.
    source_PK = torch.where(source_present_PK, source_mean_logps_PK.to(initial_P1.dtype), initial_P1)
    clipped_PK = torch.maximum(source_PK, initial_P1) if chosen else torch.minimum(source_PK, initial_P1)
    if fusion == "max_margin":
        best_P1 = (clipped_PK - initial_P1).abs().argmax(dim=-1, keepdim=True)
        return clipped_PK.gather(-1, best_P1).squeeze(-1)
    if fusion == "mean":
        logits_PK = torch.zeros_like(clipped_PK)
    elif fusion == "confidence":
        logits_PK = clipped_PK
    else:
        raise ValueError(f"InfiFPO fusion {fusion!r} is unknown: use 'max_margin', 'mean' or 'confidence'")
    weights_PK = logits_PK.masked_fill(~source_present_PK, float("-inf")).softmax(dim=-1)
    fused_P = (weights_PK * clipped_PK).sum(dim=-1)
    return torch.where(source_present_PK.any(dim=-1), fused_P, initial_mean_logps_P)


def infifpo(
    policy: Sides,
    reference: Sides,
    lengths: Sides,
    source_mean_logps: Sides,
    source_present_PK: Tensor,
    *,
    beta: float,
    fusion: str = "max_margin",
) -> PairLoss:
    """InfiFPO: -log s(b (bar pi(y+) - f(y+)) - b (bar pi(y-) - f(y-))), f from `fused_reference`.

    Args:
        policy: [P] log pi(y+ | x) and log pi(y- | x), summed.
        reference: [P] log-probabilities of the same under the initial target, summed.
        lengths: [P] |y+| and |y-| in the target's tokens.
        source_mean_logps: [P, K] bar_i(y+) and bar_i(y-), per token of source i's tokenizer.
        source_present_PK: [P, K] bool, sources with a value for both responses.
        beta: b > 0 (the authors use 2.5).
        fusion: how sources are fused, see `fused_reference`.

    Returns:
        PairLoss; implicit rewards b (bar pi - f). Without any source it is LN-DPO against the initial target.
    """
    rewards = []
    for side, chosen in enumerate((True, False)):
        initial_P = mean_logps(reference[side], lengths[side])
        fused_P = fused_reference(source_mean_logps[side], source_present_PK, initial_P, chosen=chosen, fusion=fusion)
        rewards.append(beta * (mean_logps(policy[side], lengths[side]) - fused_P))
    chosen_P, rejected_P = rewards
    return PairLoss(-logsigmoid(chosen_P - rejected_P), chosen_P.detach(), rejected_P.detach())


def _infifpo(
    policy: Sides,
    reference: Sides,
    lengths: Sides,
    chosen_PK: Tensor,
    rejected_PK: Tensor,
    present_PK: Tensor,
    **options,
) -> PairLoss:
    return infifpo(policy, reference, lengths, (chosen_PK, rejected_PK), present_PK, **options)


LOSSES = (
    LossSpec(
        name="infifpo",
        function=_infifpo,
        needs=(
            *PAIR,
            "lengths",
            "source_chosen_mean_logps_PK",
            "source_rejected_mean_logps_PK",
            "source_present_PK",
        ),
        options={"beta": positive(2.5), "fusion": choice("max_margin", ("max_margin", "mean", "confidence")), **SFT},
    ),
)
