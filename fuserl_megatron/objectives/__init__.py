"""The mathematics: source weights, log-probability sums, SFT and preference losses. Imports torch alone."""

from fuserl_megatron.objectives import absolute, group_losses, infifpo, preference
from fuserl_megatron.objectives.spec import LossSpec as LossSpec

LOSSES: dict[str, LossSpec] = {
    spec.name: spec for module in (preference, absolute, group_losses, infifpo) for spec in module.LOSSES
}
"""Every preference loss by its name in objective.loss."""
