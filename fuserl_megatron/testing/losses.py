"""What every preference loss must show, the package's own and a user's: call `check_loss` in a test.

Shapes: N sequences, P pairs, K sources.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fuserl_megatron.objectives.spec import LossSpec, Unit
from fuserl_megatron.objectives.terms import PreferenceTerms, preference_terms

N, P, K = 8, 4, 2
SPREAD = 2.0
"""Nats by which policy and reference differ at most: near the start, where no loss has reached its margin."""


def example_batch(seed: int) -> SimpleNamespace:
    """Random inputs of every loss in float64: N responses of two prompts, good ones first, P pairs of them."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths_N = torch.randint(3, 12, (N,), generator=generator)
    good_N = torch.arange(N) < P
    return SimpleNamespace(
        lengths_N=lengths_N,
        reference_logps_N=-lengths_N * (0.5 + rand(N)),
        chosen_index_P=torch.arange(P),
        rejected_index_P=torch.arange(P, N),
        source_index_P=torch.arange(P).roll(1),
        reward_gaps_P=0.1 + 0.8 * rand(P),
        source_chosen_mean_logps_PK=-2.0 * rand(P, K),
        source_rejected_mean_logps_PK=-2.0 * rand(P, K),
        source_present_PK=torch.tensor([[True, True], [False, True], [True, False], [False, False]]),
        group_ids_N=torch.arange(N) % 2,
        advantages_N=torch.where(good_N, 1.0, -1.0) * torch.tensor([0.3, 0.6]).double().repeat(P),
        best_N=torch.arange(N) < 2,
        desirable_N=good_N,
    )


def check_loss(
    spec: LossSpec, options: Mapping[str, Any] | None = None, points: int = 5, *, monotonic: bool = True
) -> None:
    """Assert what every loss must show, at several random points near policy == reference.

    - one finite loss per pair, triple or response; metrics detached;
    - the gradient is that of the function (float64, finite differences);
    - raising the log-probability of a chosen response never raises a loss, that of a rejected one never lowers it (not
      asked with monotonic=False: APO-down and DiscoPOP are meant to do otherwise);
    - the implicit rewards and so the margin move the same way;
    - where `spec.start` gives a number, it is the loss while policy == reference.

    Raises:
        AssertionError: names the loss and what does not hold.
        ValueError: the options are not those of the loss.
    """
    complete = spec.complete(options or {})
    if "rpo_alpha" in complete:
        complete["rpo_alpha"] = 0.0
    for seed in range(points):
        batch = example_batch(seed)
        noise_N = 2 * torch.rand(N, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64) - 1
        logps_N = (batch.reference_logps_N + SPREAD * noise_N).clamp(max=-0.1).requires_grad_()
        _check_point(spec, complete, logps_N, batch, monotonic)
    batch = example_batch(points)
    expected = spec.start(complete)
    if expected is not None:
        losses_I = _terms(spec, complete, batch.reference_logps_N, batch, kl=0.0).losses_I
        assert (losses_I - expected).abs().max() < 1e-9, (
            f"loss {spec.name}: while policy == reference it is {losses_I.tolist()}, and `start` says {expected}"
        )


def _terms(
    spec: LossSpec, options: Mapping[str, Any], logps_N: Tensor, batch: Any, kl: float = 0.25
) -> PreferenceTerms:
    return preference_terms(spec, options, logps_N, batch, alpha=0.1, kl=kl)


def _check_point(spec: LossSpec, options: Mapping[str, Any], logps_N: Tensor, batch: Any, monotonic: bool) -> None:
    terms = _terms(spec, options, logps_N, batch)
    size = P if spec.unit.compares else N
    assert terms.losses_I.shape == (size,), f"loss {spec.name}: {tuple(terms.losses_I.shape)} losses, not ({size},)"
    assert bool(terms.losses_I.isfinite().all()), f"loss {spec.name}: a loss is not finite"
    for name, (values_I, _) in terms.metrics.items():
        assert not values_I.requires_grad, f"loss {spec.name}: the metric {name} is not detached"
    assert torch.autograd.gradcheck(lambda x: _terms(spec, options, x, batch).losses_I, logps_N)
    good_N, bad_N = batch.desirable_N, ~batch.desirable_N
    if spec.unit is Unit.ALL_RESPONSES:  # a regulariser may pull either way: what counts is policy == reference
        logps_N = batch.reference_logps_N.clone().requires_grad_()
        terms = _terms(spec, options, logps_N, batch)
    (slope_N,) = torch.autograd.grad(terms.losses_I.sum(), logps_N)
    if monotonic:
        assert bool((slope_N[good_N] <= 0).all()), f"loss {spec.name}: it rises when a chosen response gets likelier"
        assert bool((slope_N[bad_N] >= 0).all()), f"loss {spec.name}: it falls when a rejected response gets likelier"
    assert bool((slope_N != 0).any()), f"loss {spec.name}: it teaches nothing"
    step_N = torch.where(good_N, 0.01, -0.01)
    after = _terms(spec, options, logps_N.detach() + step_N, batch).metrics["margin"][0]
    before = terms.metrics["margin"][0]
    assert bool((after >= before).all() and (after > before).any()), f"loss {spec.name}: its margin has the wrong sign"
