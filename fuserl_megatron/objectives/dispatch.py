"""From the name of a loss and a batch's tensors to unreduced losses and metrics: one plain match statement.

Shapes: N sequences (responses) of the batch, P pairs or triples, K sources, I items (P, or N for RLOO and KTO).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl_megatron.objectives import group_losses, infifpo, preference
from fuserl_megatron.objectives.loss_table import PreferenceLoss, checked_options
from fuserl_megatron.objectives.preference import PairLoss, sft_term


@dataclass(frozen=True, kw_only=True)
class PreferenceInputs:
    """What the losses read; which loss needs which fields is in loss_table.py. Indices point into the N sequences."""

    policy_logps_N: Tensor
    """log pi summed over response tokens, nats, with gradient."""
    lengths_N: Tensor
    """Scored tokens of each sequence."""
    reference_logps_N: Tensor | None = None
    """log pi_ref of the same sequences; None for a reference-free loss."""
    chosen_index_P: Tensor | None = None
    """Pairs and triples: the chosen response (WRPO: the target's own best)."""
    rejected_index_P: Tensor | None = None
    """Pairs and triples: the rejected response (WRPO: the target's own worst)."""
    source_index_P: Tensor | None = None
    """WRPO: the best response over all sources."""
    alpha: float | None = None
    """WRPO: the weight of the source response at this step, from `wrpo_alpha`."""
    reward_gaps_P: Tensor | None = None
    """MaPPO: r+ - r- in [0, 1]."""
    source_chosen_mean_logps_PK: Tensor | None = None
    """InfiFPO: per-token mean log-probability of the chosen response under each source."""
    source_rejected_mean_logps_PK: Tensor | None = None
    """InfiFPO: the same of the rejected response."""
    source_present_PK: Tensor | None = None
    """InfiFPO: bool, which sources have values."""
    group_ids_N: Tensor | None = None
    """RLOO: the (prompt, source) each response belongs to, 0..num_groups-1."""
    num_groups: int | None = None
    """RLOO: how many groups there are."""
    advantages_N: Tensor | None = None
    """RLOO: leave-one-out advantages."""
    best_N: Tensor | None = None
    """RLOO: bool, the best response of each group, the one an SFT term learns and the metrics call chosen."""
    desirable_N: Tensor | None = None
    """KTO: bool; also the responses the SFT term learns."""
    kl: Tensor | float | None = None
    """KTO: the reference point over the global batch, from `kto_kl`."""


class PreferenceTerms(NamedTuple):
    """Unreduced, unweighted losses and detached metrics."""

    losses_I: Tensor
    """Losses, SFT term included, to be multiplied by the item weights, summed and divided once by #prompts."""
    metrics: dict[str, tuple[Tensor, Tensor | None]]
    """Name -> (values_I, mask_I of the items that have a value, None for all); see `reduce.sum_count`."""


def metrics_of(loss: PreferenceLoss) -> tuple[str, ...]:
    """Names of the metrics that `preference_losses` gives for a loss.

    accuracy and margin compare the responses that the loss compares: chosen and rejected, RLOO's best and worst of a
    group (its implicit rewards are h, log pi without a reference), WRPO's y_wt and y_l. KTO's responses are judged one
    by one: its margin is a difference of means, and there is no accuracy.
    """
    names = ("accuracy", "margin", "chosen_implicit_reward", "rejected_implicit_reward", "sft_nll")
    return (names[1:] if loss is PreferenceLoss.KTO else names) + ("chosen_length", "rejected_length")


def preference_losses(
    loss: str | PreferenceLoss, inputs: PreferenceInputs, options: Mapping[str, object]
) -> PreferenceTerms:
    """Losses and metrics of a batch.

    Args:
        loss: which one.
        inputs: the batch's tensors.
        options: options of that loss; completed and checked by `checked_options`.

    Returns:
        PreferenceTerms over P pairs or triples, or over the N sequences for RLOO and KTO.

    Raises:
        ValueError: an unknown loss or option, or an input that the loss needs is missing.
    """
    loss = PreferenceLoss(loss)
    options = checked_options(loss, options)
    rpo_alpha = options.pop("rpo_alpha", 0.0)
    if loss is PreferenceLoss.RLOO:
        return _rloo_terms(inputs, rpo_alpha, **options)
    if loss is PreferenceLoss.KTO:
        return _kto_terms(inputs, rpo_alpha, **options)

    def need(name: str) -> Tensor:
        return _need(loss, inputs, name)

    chosen, rejected = need("chosen_index_P"), need("rejected_index_P")
    policy = (inputs.policy_logps_N[chosen], inputs.policy_logps_N[rejected])
    lengths = (inputs.lengths_N[chosen], inputs.lengths_N[rejected])

    def reference() -> tuple[Tensor, Tensor]:
        return need("reference_logps_N")[chosen], need("reference_logps_N")[rejected]

    learned = chosen  # the response an SFT term learns
    match loss:
        case PreferenceLoss.DPO:
            pairs = preference.dpo(*policy, *reference(), **options)
        case PreferenceLoss.LN_DPO:
            pairs = preference.ln_dpo(*policy, *reference(), *lengths, **options)
        case PreferenceLoss.CDPO:
            pairs = preference.cdpo(*policy, *reference(), **options)
        case PreferenceLoss.ROBUST:
            pairs = preference.robust(*policy, *reference(), **options)
        case PreferenceLoss.HINGE:
            pairs = preference.hinge(*policy, *reference(), **options)
        case PreferenceLoss.IPO:
            pairs = preference.ipo(*policy, *reference(), *lengths, **options)
        case PreferenceLoss.MAPPO:
            pairs = preference.mappo(*policy, *reference(), need("reward_gaps_P"), **options)
        case PreferenceLoss.SIMPO:
            gamma = options["beta"] * options["gamma_beta_ratio"]
            pairs = preference.simpo(*policy, *lengths, beta=options["beta"], gamma=gamma)
        case PreferenceLoss.CPO:
            pairs = preference.cpo(*policy, lengths[0], **options)
        case PreferenceLoss.ORPO:
            pairs = preference.orpo(*policy, *lengths, **options)
        case PreferenceLoss.INFIFPO:
            names = ("source_chosen_mean_logps_PK", "source_rejected_mean_logps_PK", "source_present_PK")
            pairs = infifpo.infifpo(*policy, *reference(), *lengths, *map(need, names), **options)
        case PreferenceLoss.WRPO:
            learned = need("source_index_P")
            pairs = group_losses.wrpo(
                inputs.policy_logps_N[learned],
                *policy,
                need("reference_logps_N")[learned],
                *reference(),
                beta=options["beta"],
                alpha=need("alpha"),
            )
    return _pair_terms(pairs, inputs.policy_logps_N[learned], inputs.lengths_N[learned], lengths, rpo_alpha)


def _pair_terms(
    pairs: PairLoss,
    learned_logps_P: Tensor,
    learned_lengths_P: Tensor,
    lengths: tuple[Tensor, Tensor],
    rpo_alpha: float,
) -> PreferenceTerms:
    losses_P = pairs.losses_P
    if rpo_alpha > 0.0:
        losses_P = losses_P + sft_term(learned_logps_P, learned_lengths_P, rpo_alpha=rpo_alpha)
    metrics = {
        "chosen_implicit_reward": (pairs.chosen_implicit_rewards_P, None),
        "rejected_implicit_reward": (pairs.rejected_implicit_rewards_P, None),
        "margin": (pairs.margins_P, None),
        "accuracy": (pairs.accuracies_P, None),
        "sft_nll": (sft_term(learned_logps_P.detach(), learned_lengths_P, rpo_alpha=1.0), None),
        "chosen_length": (lengths[0], None),
        "rejected_length": (lengths[1], None),
    }
    return PreferenceTerms(losses_P, metrics)


def _rloo_terms(inputs: PreferenceInputs, rpo_alpha: float, kl_coef: float) -> PreferenceTerms:
    advantages_N, group_ids_N, num_groups, best_N = (
        _need(PreferenceLoss.RLOO, inputs, name) for name in ("advantages_N", "group_ids_N", "num_groups", "best_N")
    )
    policy_logps_N, reference_logps_N = inputs.policy_logps_N, inputs.reference_logps_N
    losses_N = group_losses.rloo(
        policy_logps_N, advantages_N, group_ids_N, num_groups, reference_logps_N=reference_logps_N, kl_coef=kl_coef
    )
    nll_N = sft_term(policy_logps_N, inputs.lengths_N, rpo_alpha=1.0)
    losses_N = losses_N + rpo_alpha * nll_N * best_N
    rewards_N = policy_logps_N.detach() - (0.0 if reference_logps_N is None else reference_logps_N)
    # each group's worst response (ties: the first), given to every response of the group
    lowest_U = advantages_N.new_zeros(num_groups).scatter_reduce(0, group_ids_N, advantages_N, "amin")
    index_N = torch.arange(advantages_N.numel(), device=group_ids_N.device)
    candidates_N = torch.where(advantages_N == lowest_U[group_ids_N], index_N, advantages_N.numel())
    first_U = index_N.new_full((num_groups,), advantages_N.numel()).scatter_reduce(0, group_ids_N, candidates_N, "amin")
    worst_N = first_U[group_ids_N]
    compared_N = best_N & (lowest_U[group_ids_N] < 0)  # a lone response, or equal rewards, compare with nothing
    margins_N = rewards_N - rewards_N[worst_N]
    metrics = {
        "chosen_implicit_reward": (rewards_N, compared_N),
        "rejected_implicit_reward": (rewards_N[worst_N], compared_N),
        "margin": (margins_N, compared_N),
        "accuracy": ((margins_N > 0).to(margins_N.dtype), compared_N),
        "sft_nll": (nll_N.detach(), best_N),
        "chosen_length": (inputs.lengths_N, compared_N),
        "rejected_length": (inputs.lengths_N[worst_N], compared_N),
    }
    return PreferenceTerms(losses_N, metrics)


def _kto_terms(inputs: PreferenceInputs, rpo_alpha: float, **options: float) -> PreferenceTerms:
    loss = PreferenceLoss.KTO
    reference_logps_N = _need(loss, inputs, "reference_logps_N")
    desirable_N = _need(loss, inputs, "desirable_N")
    losses_N = group_losses.kto(
        inputs.policy_logps_N, reference_logps_N, desirable_N, _need(loss, inputs, "kl"), **options
    )
    nll_N = sft_term(inputs.policy_logps_N, inputs.lengths_N, rpo_alpha=1.0)
    losses_N = losses_N + rpo_alpha * nll_N * desirable_N
    rewards_N = options["beta"] * (inputs.policy_logps_N.detach() - reference_logps_N)
    metrics = {
        "chosen_implicit_reward": (rewards_N, desirable_N),
        "rejected_implicit_reward": (rewards_N, ~desirable_N),
        # there are as many desirable as undesirable ones: the mean of these is the difference of their two means
        "margin": (2.0 * torch.where(desirable_N, rewards_N, -rewards_N), None),
        "sft_nll": (nll_N.detach(), desirable_N),
        "chosen_length": (inputs.lengths_N, desirable_N),
        "rejected_length": (inputs.lengths_N, ~desirable_N),
    }
    return PreferenceTerms(losses_N, metrics)


def _need(loss: PreferenceLoss, inputs: PreferenceInputs, name: str):
    value = getattr(inputs, name)
    if value is None:
        raise ValueError(f"loss {loss.value} needs {name} in its inputs: the batch was built for another loss")
    return value
