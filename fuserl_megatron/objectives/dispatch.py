"""From the name of a loss and a batch's tensors to unreduced losses and metrics: one plain match statement.

Shapes: N sequences (responses) of the batch, P pairs or triples, K sources, I items (P, or N for RLOO and KTO).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

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
    """RLOO with rpo_alpha: bool, the best response of each group, the one the SFT term learns."""
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


METRIC_NAMES = ("chosen_implicit_reward", "rejected_implicit_reward", "margin", "accuracy", "log_ratio", "sft_nll")
"""Every metric name any loss gives: the fixed order for `reduce.stack`."""


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
    return _pair_terms(pairs, inputs.policy_logps_N[learned], inputs.lengths_N[learned], rpo_alpha)


def _pair_terms(pairs: PairLoss, learned_logps_P: Tensor, learned_lengths_P: Tensor, rpo_alpha: float):
    losses_P = pairs.losses_P
    if rpo_alpha > 0.0:
        losses_P = losses_P + sft_term(learned_logps_P, learned_lengths_P, rpo_alpha=rpo_alpha)
    metrics = {
        "chosen_implicit_reward": (pairs.chosen_implicit_rewards_P, None),
        "rejected_implicit_reward": (pairs.rejected_implicit_rewards_P, None),
        "margin": (pairs.margins_P, None),
        "accuracy": (pairs.accuracies_P, None),
        "sft_nll": (sft_term(learned_logps_P.detach(), learned_lengths_P, rpo_alpha=1.0), None),
    }
    return PreferenceTerms(losses_P, metrics)


def _rloo_terms(inputs: PreferenceInputs, rpo_alpha: float, kl_coef: float) -> PreferenceTerms:
    loss = PreferenceLoss.RLOO
    losses_N = group_losses.rloo(
        inputs.policy_logps_N,
        _need(loss, inputs, "advantages_N"),
        _need(loss, inputs, "group_ids_N"),
        _need(loss, inputs, "num_groups"),
        reference_logps_N=inputs.reference_logps_N,
        kl_coef=kl_coef,
    )
    metrics = {}
    if inputs.reference_logps_N is not None:
        metrics["log_ratio"] = (inputs.policy_logps_N.detach() - inputs.reference_logps_N, None)
    if rpo_alpha > 0.0 or inputs.best_N is not None:
        best_N = _need(loss, inputs, "best_N")
        nll_N = sft_term(inputs.policy_logps_N, inputs.lengths_N, rpo_alpha=1.0)
        losses_N = losses_N + rpo_alpha * nll_N * best_N
        metrics["sft_nll"] = (nll_N.detach(), best_N)
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
    log_ratios_N = inputs.policy_logps_N.detach() - reference_logps_N
    metrics = {
        "chosen_implicit_reward": (options["beta"] * log_ratios_N, desirable_N),
        "rejected_implicit_reward": (options["beta"] * log_ratios_N, ~desirable_N),
        "log_ratio": (log_ratios_N, None),
        "sft_nll": (nll_N.detach(), desirable_N),
    }
    return PreferenceTerms(losses_N, metrics)


def _need(loss: PreferenceLoss, inputs: PreferenceInputs, name: str):
    value = getattr(inputs, name)
    if value is None:
        raise ValueError(f"loss {loss.value} needs {name} in its inputs: the batch was built for another loss")
    return value
