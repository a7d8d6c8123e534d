"""From the name of a loss and a batch's tensors to unreduced losses and metrics: one plain match statement.

Shapes: N sequences (responses) of the batch, P pairs or triples, K sources, I items (P, or N for RLOO and KTO).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuserl_megatron.objectives import group_losses, infifpo, preference
from fuserl_megatron.objectives.loss_table import PreferenceLoss, checked_options
from fuserl_megatron.objectives.preference import PairLoss, sft_term


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
    loss: str | PreferenceLoss,
    policy_logps_N: Tensor,
    batch: Any,
    options: Mapping[str, object],
    *,
    alpha: float | None = None,
    kl: float | None = None,
) -> PreferenceTerms:
    """Losses and metrics of a batch.

    Args:
        loss: which one.
        policy_logps_N: [N] log pi summed over response tokens, nats, with gradient.
        batch: a `data.batch.PackedBatch`, or anything with those of its per-sequence and per-pair fields that the loss
            reads (loss_table.py): lengths, indices into the N sequences, reference log-probabilities and so on.
        options: options of that loss; completed and checked by `checked_options`.
        alpha: WRPO: the weight of the source response at this step, from `wrpo_alpha`.
        kl: KTO: the reference point over the global batch, from `kto_kl`.

    Returns:
        PreferenceTerms over P pairs or triples, or over the N sequences for RLOO and KTO.

    Raises:
        ValueError: an unknown loss or option, or an input that the loss needs is missing.
    """
    loss = PreferenceLoss(loss)
    options = checked_options(loss, options)
    rpo_alpha = options.pop("rpo_alpha", 0.0)
    if loss is PreferenceLoss.RLOO:
        return _rloo_terms(policy_logps_N, batch, rpo_alpha, **options)
    if loss is PreferenceLoss.KTO:
        return _kto_terms(policy_logps_N, batch, rpo_alpha, _given(loss, "kl", kl), **options)

    def need(name: str) -> Tensor:
        return _need(loss, batch, name)

    chosen, rejected = need("chosen_index_P"), need("rejected_index_P")
    policy = (policy_logps_N[chosen], policy_logps_N[rejected])
    lengths = (batch.lengths_N[chosen], batch.lengths_N[rejected])

    def reference(*indices: Tensor) -> tuple[Tensor, ...]:
        logps_N = need("reference_logps_N").to(policy_logps_N.dtype)
        return tuple(logps_N[index_P] for index_P in indices or (chosen, rejected))

    learned = chosen  # the response an SFT term learns
    match loss:
        case PreferenceLoss.DPO:
            pairs = preference.dpo(policy, reference(), **options)
        case PreferenceLoss.LN_DPO:
            pairs = preference.ln_dpo(policy, reference(), lengths, **options)
        case PreferenceLoss.CDPO:
            pairs = preference.cdpo(policy, reference(), **options)
        case PreferenceLoss.ROBUST:
            pairs = preference.robust(policy, reference(), **options)
        case PreferenceLoss.HINGE:
            pairs = preference.hinge(policy, reference(), **options)
        case PreferenceLoss.IPO:
            pairs = preference.ipo(policy, reference(), lengths, **options)
        case PreferenceLoss.MAPPO:
            pairs = preference.mappo(policy, reference(), need("reward_gaps_P"), **options)
        case PreferenceLoss.SIMPO:
            gamma = options["beta"] * options["gamma_beta_ratio"]
            pairs = preference.simpo(policy, lengths, beta=options["beta"], gamma=gamma)
        case PreferenceLoss.CPO:
            pairs = preference.cpo(policy, lengths, **options)
        case PreferenceLoss.ORPO:
            pairs = preference.orpo(policy, lengths, **options)
        case PreferenceLoss.INFIFPO:
            source = need("source_chosen_mean_logps_PK"), need("source_rejected_mean_logps_PK")
            pairs = infifpo.infifpo(policy, reference(), lengths, source, need("source_present_PK"), **options)
        case PreferenceLoss.WRPO:
            learned = need("source_index_P")
            source = policy_logps_N[learned], *reference(learned)
            alpha = _given(loss, "alpha", alpha)
            pairs = group_losses.wrpo(policy, reference(), *source, beta=options["beta"], alpha=alpha)
    return _pair_terms(pairs, policy_logps_N[learned], batch.lengths_N[learned], lengths, rpo_alpha)


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


def _rloo_terms(policy_logps_N: Tensor, batch: Any, rpo_alpha: float, kl_coef: float) -> PreferenceTerms:
    advantages_N, group_ids_N, best_N = (
        _need(PreferenceLoss.RLOO, batch, name) for name in ("advantages_N", "group_ids_N", "best_N")
    )
    reference_logps_N, num_groups = batch.reference_logps_N, policy_logps_N.numel()  # ids lie below N
    losses_N = group_losses.rloo(
        policy_logps_N, advantages_N, group_ids_N, num_groups, reference_logps_N=reference_logps_N, kl_coef=kl_coef
    )
    nll_N = sft_term(policy_logps_N, batch.lengths_N, rpo_alpha=1.0)
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
        "chosen_length": (batch.lengths_N, compared_N),
        "rejected_length": (batch.lengths_N[worst_N], compared_N),
    }
    return PreferenceTerms(losses_N, metrics)


def _kto_terms(policy_logps_N: Tensor, batch: Any, rpo_alpha: float, kl: float, **options: float) -> PreferenceTerms:
    reference_logps_N = _need(PreferenceLoss.KTO, batch, "reference_logps_N")
    desirable_N = _need(PreferenceLoss.KTO, batch, "desirable_N")
    losses_N = group_losses.kto(policy_logps_N, reference_logps_N, desirable_N, kl, **options)
    nll_N = sft_term(policy_logps_N, batch.lengths_N, rpo_alpha=1.0)
    losses_N = losses_N + rpo_alpha * nll_N * desirable_N
    rewards_N = options["beta"] * (policy_logps_N.detach() - reference_logps_N)
    metrics = {
        "chosen_implicit_reward": (rewards_N, desirable_N),
        "rejected_implicit_reward": (rewards_N, ~desirable_N),
        # there are as many desirable as undesirable ones: the mean of these is the difference of their two means
        "margin": (2.0 * torch.where(desirable_N, rewards_N, -rewards_N), None),
        "sft_nll": (nll_N.detach(), desirable_N),
        "chosen_length": (batch.lengths_N, desirable_N),
        "rejected_length": (batch.lengths_N, ~desirable_N),
    }
    return PreferenceTerms(losses_N, metrics)


def _need(loss: PreferenceLoss, batch: Any, name: str) -> Tensor:
    return _given(loss, name, getattr(batch, name))


def _given(loss: PreferenceLoss, name: str, value: Any) -> Any:
    if value is None:
        raise ValueError(f"loss {loss.value} needs {name} in its inputs: the batch was built for another loss")
    return value
