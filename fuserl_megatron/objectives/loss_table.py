"""Which losses exist, what each one needs and which options it reads: plain data, checked by config and by the tests.

An option that a loss does not read is refused by `checked_options`, never ignored.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class PreferenceLoss(StrEnum):
    """The closed list of stage-2 losses; the equations stand in preference.py and group_losses.py."""

    DPO = "dpo"
    LN_DPO = "ln_dpo"
    CDPO = "cdpo"
    ROBUST = "robust"
    HINGE = "hinge"
    IPO = "ipo"
    SIMPO = "simpo"
    CPO = "cpo"
    ORPO = "orpo"
    KTO = "kto"
    RLOO = "rloo"
    WRPO = "wrpo"
    MAPPO = "mappo"
    INFIFPO = "infifpo"


class Unit(StrEnum):
    """What one loss term is made of, and with it what the batch must hold of a prompt."""

    PAIRS = "pairs"  # chosen and rejected inside one source: chosen_index_P, rejected_index_P
    TRIPLES = "triples"  # best of all sources, best and worst of the target's own samples
    ALL_RESPONSES = "all_responses"  # every stored response of a source: group_ids_N, advantages_N
    SINGLE_RESPONSES = "single_responses"  # responses one by one, each marked good or bad: desirable_N


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """What one loss needs."""

    unit: Unit
    """Its loss term: one per pair, triple, or response."""
    reference: bool
    """Whether reference log-probabilities are read (RLOO: only with kl_coef > 0, see `needs_reference`)."""
    options: Mapping[str, float | bool | str | None] = field(default_factory=dict)
    """Option -> default; None means that there is no default and the user must choose."""


# Defaults are published settings (docs/math.md, conf/); beta differs by three orders of magnitude between the losses
# and is therefore never shared. rpo_alpha is the weight of the SFT term beside the loss.
# fmt: off
LOSSES: Mapping[PreferenceLoss, LossSpec] = {
    PreferenceLoss(name): LossSpec(unit=unit, reference=reference, options=options)
    for name, unit, reference, options in (
        ("dpo", Unit.PAIRS, True, dict(beta=0.01, rpo_alpha=0.0)),
        ("ln_dpo", Unit.PAIRS, True, dict(beta=10.0, rpo_alpha=0.0)),
        ("cdpo", Unit.PAIRS, True, dict(beta=0.01, label_smoothing=None, rpo_alpha=0.0)),
        ("robust", Unit.PAIRS, True, dict(beta=0.01, label_smoothing=None, rpo_alpha=0.0)),
        ("hinge", Unit.PAIRS, True, dict(beta=0.01, rpo_alpha=0.0)),
        ("ipo", Unit.PAIRS, True, dict(beta=0.1, length_normalized=True, rpo_alpha=0.0)),
        ("simpo", Unit.PAIRS, False, dict(beta=10.0, gamma_beta_ratio=0.3, rpo_alpha=0.0)),
        ("cpo", Unit.PAIRS, False, dict(beta=0.1, cpo_alpha=1.0)),
        ("orpo", Unit.PAIRS, False, dict(beta=0.1)),
        ("kto", Unit.SINGLE_RESPONSES, True,
         dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, rpo_alpha=0.0)),
        ("rloo", Unit.ALL_RESPONSES, True, dict(kl_coef=0.0, rpo_alpha=0.0)),
        ("wrpo", Unit.TRIPLES, True, dict(beta=0.01, alpha_end=0.1, rpo_alpha=0.0)),
        ("mappo", Unit.PAIRS, True, dict(beta=0.01, rpo_alpha=0.0)),
        ("infifpo", Unit.PAIRS, True, dict(beta=2.5, fusion="max_margin", rpo_alpha=0.0)),
    )
}
# fmt: on

FUSIONS = ("max_margin", "mean", "confidence")


def _number(holds: Callable[[float], bool]) -> Callable[[object], bool]:
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and holds(v)


# What an option's value must be: (test, words for the error).
_NOT_NEGATIVE = (_number(lambda v: 0 <= v < math.inf), "zero or a positive number")
_RULES = {
    "beta": (_number(lambda v: 0 < v < math.inf), "a positive number"),
    "label_smoothing": (_number(lambda v: 0 <= v < 0.5), "a number in [0, 0.5)"),
    "length_normalized": (lambda v: isinstance(v, bool), "true or false"),
    "fusion": (lambda v: v in FUSIONS, f"one of {', '.join(FUSIONS)}"),
    "gamma_beta_ratio": _NOT_NEGATIVE,
    "cpo_alpha": _NOT_NEGATIVE,
    "rpo_alpha": _NOT_NEGATIVE,
    "desirable_weight": _NOT_NEGATIVE,
    "undesirable_weight": _NOT_NEGATIVE,
    "kl_coef": _NOT_NEGATIVE,
    "alpha_end": (_number(lambda v: 0 <= v <= 1), "a number in [0, 1]"),
}


def needs_reference(loss: PreferenceLoss, options: Mapping[str, object]) -> bool:
    """Whether reference log-probabilities are read under these options (complete ones, from `checked_options`).

    They are not by the reference-free losses and by RLOO without a KL term.
    """
    if loss is PreferenceLoss.RLOO:
        return float(options["kl_coef"]) > 0.0
    return LOSSES[loss].reference


def checked_options(loss: str | PreferenceLoss, given: Mapping[str, object]) -> dict[str, object]:
    """The complete options of a loss, every one that it reads: the given ones, checked, and defaults for the rest.

    Raises:
        ValueError: unknown loss, an option the loss does not read, a required one missing, or a value out of range.
    """
    try:
        loss = PreferenceLoss(loss)
    except ValueError:
        raise ValueError(
            f"loss {loss!r} is unknown{_nearest(str(loss), [known.value for known in PreferenceLoss])}"
        ) from None
    spec = LOSSES[loss]
    for name in given:
        if name not in spec.options:
            raise ValueError(
                f"loss {loss.value} does not use the option {name!r}{_nearest(name, list(spec.options))}; remove it"
            )
    options = {**spec.options, **given}
    for name, value in options.items():
        if value is None:
            raise ValueError(f"loss {loss.value} needs the option {name!r}: give a value, e.g. {name}=0.1")
        is_valid, rule = _RULES[name]
        if not is_valid(value):
            raise ValueError(f"loss {loss.value}: {name}={value!r} must be {rule}")
    return options


def first_step_loss(loss: PreferenceLoss, options: Mapping[str, object]) -> float | None:
    """The loss of every item while policy == reference, the SFT term left out: a run must start from this number.

    None where it depends on the data (reference-free losses, RLOO, InfiFPO, KTO with two weights). The options are
    complete ones, from `checked_options`.
    """
    match loss.value:
        case "dpo" | "ln_dpo" | "cdpo" | "robust" | "mappo" | "wrpo":
            return math.log(2.0)
        case "hinge":
            return 1.0
        case "ipo":
            return (1.0 / (2.0 * float(options["beta"]))) ** 2
        case "kto" if options["desirable_weight"] == options["undesirable_weight"]:
            return 0.5 * float(options["desirable_weight"])
    return None


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {match[0]!r}?" if match else ""
    return f"{hint} (it has: {', '.join(known)})"
