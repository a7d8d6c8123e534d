"""DPO whose pairs count by their own reward gap instead of their source's weight: an idea to be tried, not FuseRL."""

from fuserl_megatron.objectives import LossSpec
from fuserl_megatron.objectives.preference import PAIR, dpo
from fuserl_megatron.objectives.spec import not_negative, positive

MEAN_GAP = 0.25
"""Of the pairs' scaled rewards, about: so that a pair counts 1 in the mean, as with source weights."""


def gap_dpo(policy, reference, reward_gaps_P, *, beta):
    """DPO times gap / MEAN_GAP; the data set's rewards are scaled so that gaps lie in [0, 1]."""
    pairs = dpo(policy, reference, beta=beta)
    return pairs._replace(losses_P=reward_gaps_P.to(pairs.losses_P.dtype) / MEAN_GAP * pairs.losses_P)


GAP_DPO = LossSpec(
    name="gap_dpo",
    function=gap_dpo,
    needs=(*PAIR, "reward_gaps_P"),
    options={"beta": positive(0.1), "rpo_alpha": not_negative(0.0)},
)
