"""The mathematics: source weights, log-probability sums, SFT and preference losses. Imports torch alone."""

from fuserl_megatron.objectives import group_losses, infifpo, preference
from fuserl_megatron.objectives.spec import LossSpec as LossSpec

LOSSES: dict[str, LossSpec] = {spec.name: spec for spec in (*preference.LOSSES, *group_losses.LOSSES, *infifpo.LOSSES)}
"""Every preference loss by its name in objective.loss."""
