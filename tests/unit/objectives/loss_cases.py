"""Every loss as a function of log-probabilities alone, on the same random batch, for tests that run over all losses."""

import functools

import torch

from fuserl_megatron.objectives import LOSSES

P, K = 7, 3


def random_batch(dtype=torch.float64, scale=20.0):
    """Log-probabilities, lengths, reward gaps, source columns and groups of P pairs (or sequences)."""
    generator = torch.Generator().manual_seed(3)

    def logps(*shape):
        return (-scale * (0.05 + torch.rand(*shape, generator=generator, dtype=torch.float64))).to(dtype)

    return {
        "policy": [logps(P) for _ in range(3)],
        "reference": [logps(P) for _ in range(3)],
        "lengths": [torch.randint(3, 12, (P,), generator=generator) for _ in range(2)],
        "gaps": torch.rand(P, generator=generator, dtype=torch.float64),
        "sources": [logps(P, K) / 8 for _ in range(2)],
        "present": torch.tensor([[True, True, True], [True, False, True], [False, False, False]])[torch.arange(P) % 3],
        "desirable": torch.arange(P) % 3 != 0,
        "advantages": torch.linspace(-1, 1, P, dtype=torch.float64),
        "groups": torch.tensor([0, 0, 1, 1, 1, 2, 1]),
    }


CASES = {
    "dpo": ("dpo", dict(beta=0.1)),
    "ln_dpo": ("ln_dpo", dict(beta=10.0)),
    "cdpo": ("cdpo", dict(beta=0.1, label_smoothing=0.1)),
    "robust": ("robust", dict(beta=0.1, label_smoothing=0.1)),
    "hinge": ("hinge", dict(beta=0.1)),
    "ipo_mean": ("ipo", dict(beta=0.1, length_normalized=True)),
    "ipo_sum": ("ipo", dict(beta=0.1, length_normalized=False)),
    "mappo": ("mappo", dict(beta=0.1)),
    "simpo": ("simpo", dict(beta=10.0, gamma_beta_ratio=0.3)),
    "sppo": ("sppo", dict(beta=0.01)),
    "cpo": ("cpo", dict(beta=0.1, cpo_alpha=1.0)),
    "orpo": ("orpo", dict(beta=0.1)),
    "infifpo_max_margin": ("infifpo", dict(beta=2.5, fusion="max_margin")),
    "infifpo_mean": ("infifpo", dict(beta=2.5, fusion="mean")),
    "infifpo_confidence": ("infifpo", dict(beta=2.5, fusion="confidence")),
    "wrpo": ("wrpo", dict(beta=0.1, alpha_end=0.5)),
}
"""Name -> (loss on pairs or triples, options)."""
for name, spec in LOSSES.items():  # another one is taken with its defaults
    if spec.unit.compares and all(name != loss for loss, _ in CASES.values()):
        CASES[name] = (name, {option: value for option, value in spec.defaults.items() if option != "rpo_alpha"})
PAIR_NAMES = tuple(CASES)


def pair_losses(batch):
    """Name -> function of (policy chosen, policy rejected, reference chosen, reference rejected) giving a PairLoss."""
    columns = {
        "lengths": batch["lengths"],
        "reward_gaps_P": batch["gaps"],
        "source_chosen_mean_logps_PK": batch["sources"][0],
        "source_rejected_mean_logps_PK": batch["sources"][1],
        "source_present_PK": batch["present"],
        "source_policy": batch["policy"][2],
        "source_reference": batch["reference"][2],
        "alpha": 0.1,
    }

    def call(loss, options, c, r, rc, rr):
        given = {"policy": (c, r), "reference": (rc, rr), **columns}
        return LOSSES[loss].function(*(given[name] for name in LOSSES[loss].needs), **options)

    return {name: functools.partial(call, *case) for name, case in CASES.items()}
