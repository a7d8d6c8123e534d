"""Every loss as a function of log-probabilities alone, on the same random batch, for tests that run over all losses."""

import torch

from fuserl_megatron.objectives import group_losses, infifpo, preference

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


def pair_losses(batch):
    """Name -> function of (policy chosen, policy rejected, reference chosen, reference rejected) giving a PairLoss."""
    lengths, gaps = batch["lengths"], batch["gaps"]

    def infi(fusion):
        return lambda *x: infifpo.infifpo(*x, lengths, batch["sources"], batch["present"], beta=2.5, fusion=fusion)

    def wrpo(*x):
        return group_losses.wrpo(*x, batch["policy"][2], batch["reference"][2], beta=0.1, alpha=0.1)

    losses = {
        "dpo": lambda *x: preference.dpo(*x, beta=0.1),
        "ln_dpo": lambda *x: preference.ln_dpo(*x, lengths, beta=10.0),
        "cdpo": lambda *x: preference.cdpo(*x, beta=0.1, label_smoothing=0.1),
        "robust": lambda *x: preference.robust(*x, beta=0.1, label_smoothing=0.1),
        "hinge": lambda *x: preference.hinge(*x, beta=0.1),
        "ipo_mean": lambda *x: preference.ipo(*x, lengths, beta=0.1, length_normalized=True),
        "ipo_sum": lambda *x: preference.ipo(*x, lengths, beta=0.1, length_normalized=False),
        "mappo": lambda *x: preference.mappo(*x, gaps, beta=0.1),
        "simpo": lambda policy, _: preference.simpo(policy, lengths, beta=10.0, gamma=3.0),
        "cpo": lambda policy, _: preference.cpo(policy, lengths, beta=0.1, cpo_alpha=1.0),
        "orpo": lambda policy, _: preference.orpo(policy, lengths, beta=0.1),
        "infifpo_max_margin": infi("max_margin"),
        "infifpo_mean": infi("mean"),
        "infifpo_confidence": infi("confidence"),
        "wrpo": wrpo,
    }
    return {name: lambda c, r, rc, rr, loss=loss: loss((c, r), (rc, rr)) for name, loss in losses.items()}


PAIR_NAMES = tuple(pair_losses(random_batch()))
