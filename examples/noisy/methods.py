"""The methods that are compared: where each starts, its data, its settings, and the rates it may choose from.

A method with `tries` is tuned by search.py on the development seed, six tries each; one with `rates_of` takes what
another one chose. `settings_of` is what the trainer is given, and what table.py holds each result against.
"""

import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
BUDGET = 6
SEEDS, DEVELOPMENT_SEED = tuple(range(201, 213)), 200
"""Chosen before any of them was looked at; no run of any earlier experiment has used them."""

BEST, UNIFORM = "data.reward_temperature=0", "data.reward_temperature=inf"
SFT, DPO = ("objective=fusesft", "trainer.max_epochs=16"), ("objective=fusepo_dpo", "trainer.max_epochs=2")
LN_DPO, SIMPO = ("objective=fusepo_ln_dpo", DPO[1]), ("objective=fusepo_simpo", DPO[1])
RLOO, WRPO = ("objective=fusepo_rloo", DPO[1]), ("objective=wrpo", DPO[1])
BY_GAP = (DPO[0], "objective.loss=gap_weighted:GAP_DPO", DPO[1])
MIDDLE_GAPS = ("objective.min_reward_gap=1.2", "objective.max_reward_gap=4.0")
SWEEP = (0.5, 8.0)


def _rates(*rates: str) -> tuple[str, ...]:
    return tuple(f"optim.lr={rate}" for rate in rates)


def _po_rates(low: str, high: str, *others: str) -> tuple[str, ...]:
    """Two rates without and with an SFT term, then others."""
    four = [f"optim.lr={lr} objective.rpo_alpha={alpha}" for alpha in ("0", "0.2") for lr in (low, high)]
    return (*four, *others)


def _with_beta(usual: str, other: str) -> tuple[str, ...]:
    tries = _po_rates("1e-4", "3e-4", "optim.lr=3e-4 objective.rpo_alpha=1")
    other = f"optim.lr=3e-4 objective.rpo_alpha=0.2 objective.beta={other}"
    return (*(f"{rates} objective.beta={usual}" for rates in tries), other)


SFT_RATES = _rates("1.25e-4", "2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3")
DPO_RATES, LN_DPO_RATES, SIMPO_RATES = _with_beta("0.1", "0.5"), _with_beta("10", "1"), _with_beta("2", "10")
RLOO_RATES = _po_rates("3e-5", "1e-4", "optim.lr=1e-4 objective.rpo_alpha=1", "optim.lr=3e-4 objective.rpo_alpha=0.2")


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    start: str
    """The method whose model it starts from, or target."""
    data: str
    """Which set: sft, po, own (samples of the start), mixed (po and some of them), shuffled, scaled."""
    settings: tuple[str, ...]
    """Of `fuserl train`, rates left out."""
    tries: tuple[str, ...] = ()
    """Rates to choose from, each a few settings."""
    rates_of: str | None = None
    """Takes the rates of this method instead."""
    among: str = ""
    """Only the tries that hold this text."""
    part: str = "others"
    """Which part of the run it belongs to."""


METHODS = {
    "SFT(best)": Method("target", "sft", (*SFT, BEST), SFT_RATES, part="claims"),
    "uniform SFT": Method("target", "sft", (*SFT, UNIFORM), SFT_RATES, part="claims"),
    "FuseSFT": Method("target", "sft", SFT, SFT_RATES, part="claims"),
    "FuseSFT + more FuseSFT": Method(
        "FuseSFT", "po", ("objective=fusesft", "trainer.max_epochs=4"), SFT_RATES, part="claims"
    ),
    "SFT(best) + DPO": Method("SFT(best)", "po", (*DPO, BEST), DPO_RATES, part="claims"),
    "uniform SFT + uniform DPO": Method("uniform SFT", "po", (*DPO, UNIFORM), DPO_RATES, part="claims"),
    "FuseSFT + FusePO-DPO": Method("FuseSFT", "po", DPO, DPO_RATES, part="claims"),
    "SFT(best) + SimPO": Method("SFT(best)", "po", (*SIMPO, BEST), SIMPO_RATES),
    "SFT(best) + RLOO": Method("SFT(best)", "po", (*RLOO, BEST), RLOO_RATES),
    "FuseChat-3.0": Method("SFT(best)", "po", (*LN_DPO, BEST, *MIDDLE_GAPS), LN_DPO_RATES),
    "FuseSFT + FusePO-LN-DPO": Method("FuseSFT", "po", LN_DPO, LN_DPO_RATES),
    "FuseSFT + FusePO-SimPO": Method("FuseSFT", "po", SIMPO, SIMPO_RATES),
    "FuseSFT + FusePO-RLOO": Method("FuseSFT", "po", RLOO, RLOO_RATES),
    "FuseSFT + WRPO": Method("FuseSFT", "mixed", WRPO, DPO_RATES),
    "FuseSFT + on-policy DPO": Method("FuseSFT", "own", (*DPO, UNIFORM), DPO_RATES),
    "SFT(best), equal compute": Method("target", "sft", (SFT[0], "trainer.max_epochs=64", BEST), SFT_RATES),
    "SFT(best) + DPO, equal compute": Method(
        "SFT(best), equal compute", "po", (DPO[0], "trainer.max_epochs=8", BEST), DPO_RATES
    ),
    "FuseSFT + DPO by gap": Method("FuseSFT", "scaled", (*BY_GAP, UNIFORM), DPO_RATES),
    "FuseSFT + FusePO-DPO, no SFT term": Method(
        "FuseSFT", "po", DPO, rates_of="FuseSFT + FusePO-DPO", among="rpo_alpha=0 "
    ),
    "FuseSFT + FusePO-DPO, shuffled rewards": Method("FuseSFT", "shuffled", DPO, rates_of="FuseSFT + FusePO-DPO"),
}
# Added after the twelve seeds were seen, in that method's favour: another of its own tries, level with the chosen one
METHODS["FuseChat-3.0, other rates"] = Method(
    "SFT(best)", "po", (*LN_DPO, BEST, *MIDDLE_GAPS), rates_of="FuseSFT + FusePO-LN-DPO", part="afterwards"
)
for _tau in SWEEP:
    _fixed = f"data.reward_temperature={_tau:g}"
    METHODS[f"FuseSFT, tau {_tau:g}"] = Method("target", "sft", (*SFT, _fixed), rates_of="FuseSFT", part="sweep")
    METHODS[f"FuseSFT + FusePO-DPO, tau {_tau:g}"] = Method(
        f"FuseSFT, tau {_tau:g}", "po", (*DPO, _fixed), rates_of="FuseSFT + FusePO-DPO", part="sweep"
    )


def chosen(name: str, tries: dict[tuple[str, str], float]) -> str:
    """The rates of a method: the best try on the development seed, the first of equally good ones.

    Args:
        name: of the method.
        tries: (method, rates) -> accuracy, all that search.py found.
    """
    method = METHODS[name]
    tuned = method.rates_of or name
    return max((t for t in METHODS[tuned].tries if method.among in t), key=lambda rates: tries[tuned, rates])


def settings_of(name: str, rates: str) -> list[str]:
    """What the trainer is given beside places and seed."""
    return [*METHODS[name].settings, *rates.split()]


def read_tries(path: Path = RESULTS / "search.jsonl") -> dict[tuple[str, str], float]:
    """All tries of the search."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(line["method"], line["rates"]): line["accuracy"] for line in lines}
