"""From a loss and a batch's tensors to unreduced losses and metrics, by the unit that the loss is made of.

Shapes: N sequences (responses) of the batch, P pairs or triples, U groups, I items (P, or N where a term is of one
response).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fuserl_megatron.objectives.group_losses import ResponseLoss
from fuserl_megatron.objectives.preference import PairLoss, sft_term
from fuserl_megatron.objectives.spec import LossSpec, Unit

Metrics = dict[str, tuple[Tensor, Tensor | None]]
"""Name -> (values_I, mask_I of the items that have a value, None for all); see `reduce.sum_count`."""


class Batch(Protocol):
    """What every loss reads of a micro-batch (`data.batch.PackedBatch` has it); columns of single losses beside."""

    @property
    def num_sequences(self) -> int:
        """N."""

    @property
    def lengths_N(self) -> Tensor:
        """Scored tokens."""

    @property
    def weights_N(self) -> Tensor:
        """Weights of sequences."""

    @property
    def source_ids_N(self) -> Tensor:
        """Index into the sources."""

    @property
    def chosen_index_P(self) -> Tensor:
        """Index into N."""

    @property
    def rejected_index_P(self) -> Tensor:
        """Index into N."""

    @property
    def pair_weights_P(self) -> Tensor:
        """Weights of pairs and triples."""

    @property
    def pair_source_ids_P(self) -> Tensor:
        """Index into the sources."""

    @property
    def reference_logps_N(self) -> Tensor | None:
        """Summed, in nats; None where no reference is read."""


class PreferenceTerms(NamedTuple):
    """Unreduced, unweighted losses and detached metrics."""

    losses_I: Tensor
    """Losses, SFT term included, to be multiplied by the item weights, summed and divided once by #prompts."""
    metrics: Metrics


def preference_terms(
    spec: LossSpec,
    options: Mapping[str, Any],
    policy_logps_N: Tensor,
    batch: Batch,
    *,
    alpha: float | None = None,
    kl: float | None = None,
) -> PreferenceTerms:
    """Losses and metrics of a batch.

    Args:
        spec: which loss.
        options: its complete options, from `LossSpec.complete`.
        policy_logps_N: [N] log pi summed over response tokens, nats, with gradient.
        batch: a `data.batch.PackedBatch`, or anything with those of its per-sequence and per-pair fields that the loss
            reads: lengths, indices into the N sequences, reference log-probabilities and so on.
        alpha: WRPO: the weight of the source response at this step, from `wrpo_alpha`.
        kl: KTO: the reference point over the global batch, from `kto_kl`.

    Returns:
        PreferenceTerms over P pairs or triples, or over the N sequences.

    Raises:
        ValueError: an input that the loss needs is missing.
    """
    given = {"alpha": alpha, "kl": kl}

    def need(name: str) -> Any:
        if (value := given[name] if name in given else getattr(batch, name)) is None:
            raise ValueError(f"loss {spec.name} needs {name} in its inputs: the batch was built for another loss")
        return value

    def of_unit(values_N: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if spec.unit.compares:
            return values_N[need("chosen_index_P")], values_N[need("rejected_index_P")]
        return values_N

    def reference_N() -> Tensor:
        return need("reference_logps_N").to(policy_logps_N.dtype)

    def argument(name: str) -> Any:
        match name:
            case "policy":
                return of_unit(policy_logps_N)
            case "reference":
                missing = batch.reference_logps_N is None and not spec.uses_reference(options)
                return None if missing else of_unit(reference_N())
            case "lengths":
                return of_unit(batch.lengths_N)
            case "source_policy":
                return policy_logps_N[need("source_index_P")]
            case "source_reference":
                return reference_N()[need("source_index_P")]
        return need(name)

    own = {name: value for name, value in options.items() if name != "rpo_alpha"}
    found = spec.function(*map(argument, spec.needs), **own)
    learned = need(_LEARNED[spec.unit])
    logps_I, lengths_I, mask_I = policy_logps_N, batch.lengths_N, learned
    if spec.unit.compares:
        logps_I, lengths_I, mask_I = policy_logps_N[learned], batch.lengths_N[learned], None
        metrics = _pair_metrics(found, batch)
    elif spec.unit is Unit.ALL_RESPONSES:
        metrics = _group_metrics(found, learned, batch)
    else:
        metrics = _single_metrics(found, learned, batch)
    nll_I = sft_term(logps_I, lengths_I, rpo_alpha=1.0)
    metrics["sft_nll"] = (nll_I.detach(), mask_I)
    losses_I = found[0]
    if (rpo_alpha := options.get("rpo_alpha", 0.0)) > 0.0:
        losses_I = losses_I + rpo_alpha * (nll_I if mask_I is None else nll_I * mask_I)
    return PreferenceTerms(losses_I, metrics)


_LEARNED = {
    Unit.PAIRS: "chosen_index_P",
    Unit.TRIPLES: "source_index_P",
    Unit.ALL_RESPONSES: "best_N",
    Unit.SINGLE_RESPONSES: "desirable_N",
}
"""Which responses an SFT term learns: the field of the batch that says so."""


def _pair_metrics(pairs: PairLoss, batch: Batch) -> Metrics:
    return {
        "chosen_implicit_reward": (pairs.chosen_implicit_rewards_P, None),
        "rejected_implicit_reward": (pairs.rejected_implicit_rewards_P, None),
        "margin": (pairs.margins_P, None),
        "accuracy": (pairs.accuracies_P, None),
        "chosen_length": (batch.lengths_N[batch.chosen_index_P], None),
        "rejected_length": (batch.lengths_N[batch.rejected_index_P], None),
    }


def _group_metrics(responses: ResponseLoss, best_N: Tensor, batch: Any) -> Metrics:
    """Each group's best response against its worst (ties: the first)."""
    rewards_N, advantages_N, group_ids_N = responses.implicit_rewards_N, batch.advantages_N, batch.group_ids_N
    num_groups = size = advantages_N.numel()  # ids lie below N
    # the worst response of a group is given to every response of the group
    lowest_U = advantages_N.new_zeros(num_groups).scatter_reduce(0, group_ids_N, advantages_N, "amin")
    index_N = torch.arange(size, device=group_ids_N.device)
    candidates_N = torch.where(advantages_N == lowest_U[group_ids_N], index_N, size)
    first_U = index_N.new_full((num_groups,), size).scatter_reduce(0, group_ids_N, candidates_N, "amin")
    worst_N = first_U[group_ids_N]
    compared_N = best_N & (lowest_U[group_ids_N] < 0)  # a lone response, or equal rewards, compare with nothing
    margins_N = rewards_N - rewards_N[worst_N]
    return {
        "chosen_implicit_reward": (rewards_N, compared_N),
        "rejected_implicit_reward": (rewards_N[worst_N], compared_N),
        "margin": (margins_N, compared_N),
        "accuracy": ((margins_N > 0).to(margins_N.dtype), compared_N),
        "chosen_length": (batch.lengths_N, compared_N),
        "rejected_length": (batch.lengths_N[worst_N], compared_N),
    }


def _single_metrics(responses: ResponseLoss, desirable_N: Tensor, batch: Batch) -> Metrics:
    rewards_N = responses.implicit_rewards_N
    return {
        "chosen_implicit_reward": (rewards_N, desirable_N),
        "rejected_implicit_reward": (rewards_N, ~desirable_N),
        # there are as many desirable as undesirable ones: the mean of these is the difference of their two means
        "margin": (2.0 * torch.where(desirable_N, rewards_N, -rewards_N), None),
        "chosen_length": (batch.lengths_N, desirable_N),
        "rejected_length": (batch.lengths_N, ~desirable_N),
    }
