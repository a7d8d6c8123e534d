"""What a preference loss is: one LossSpec says everything that the trainer has to know of it.

Each loss is declared in the file of its function; `objectives.LOSSES` is the table of all. An option that a loss does
not read is refused by `LossSpec.complete`, never ignored.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Unit(StrEnum):
    """What one loss term is made of, and with it what the batch must hold of a prompt."""

    PAIRS = "pairs"  # chosen and rejected inside one source: chosen_index_P, rejected_index_P
    TRIPLES = "triples"  # best of all sources, best and worst of the target's own samples
    ALL_RESPONSES = "all_responses"  # every stored response of a source: group_ids_N, advantages_N
    SINGLE_RESPONSES = "single_responses"  # responses one by one, each marked good or bad: desirable_N

    @property
    def compares(self) -> bool:
        """Whether a term compares a chosen with a rejected response; the others are terms of one response each."""
        return self in (Unit.PAIRS, Unit.TRIPLES)


@dataclass(frozen=True)
class Option:
    """An option of a loss: its default and the values it may take."""

    default: float | bool | str | None
    """None means that there is no default and the user must choose."""
    holds: Callable[[Any], bool]
    """Whether a value is valid."""
    rule: str
    """What a value must be, in the words of the error."""


def _number(holds: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and holds(v)


def number(default: float | None) -> Option:
    """An option of either sign."""
    return Option(default, _number(math.isfinite), "a finite number")


def positive(default: float | None) -> Option:
    """An option above zero."""
    return Option(default, _number(lambda v: 0 < v < math.inf), "a positive number")


def not_negative(default: float | None) -> Option:
    """An option that is zero or more."""
    return Option(default, _number(lambda v: 0 <= v < math.inf), "zero or a positive number")


def share(default: float | None, below: float | None = None) -> Option:
    """An option in [0, 1], or in [0, below)."""
    if below is None:
        return Option(default, _number(lambda v: 0 <= v <= 1), "a number in [0, 1]")
    return Option(default, _number(lambda v: 0 <= v < below), f"a number in [0, {below})")


def open_share(default: float | None, below: float | None = None) -> Option:
    """An option in (0, 1], or in (0, below)."""
    if below is None:
        return Option(default, _number(lambda v: 0 < v <= 1), "a number in (0, 1]")
    return Option(default, _number(lambda v: 0 < v < below), f"a number in (0, {below})")


def switch(default: bool) -> Option:
    """An option that is true or false."""
    return Option(default, lambda v: isinstance(v, bool), "true or false")


def choice(default: str, names: Iterable[str]) -> Option:
    """An option that is one of some names."""
    names = tuple(names)
    return Option(default, lambda v: v in names, f"one of {', '.join(names)}")


COMMON_METRICS = ("margin", "chosen_implicit_reward", "rejected_implicit_reward", "sft_nll")
LENGTH_METRICS = ("chosen_length", "rejected_length")


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """One preference loss.

    The function is called with the inputs named in `needs`, in that order, and the options (but rpo_alpha) by keyword.

        policy, reference   log pi and log pi_ref, nats, summed over response tokens
        lengths             scored tokens
        source_policy, source_reference   triples: the same two of the best response over the other sources, [P]
        alpha, kl           numbers of the step: WRPO's weight of the source response, KTO's reference point
        any other name      that field of the batch (`data.batch.PackedBatch`), such as reward_gaps_P

    For pairs and triples the first three are (chosen, rejected), [P] each, and the function returns a
    `preference.PairLoss`; for the other units they are [N], and it returns a `group_losses.ResponseLoss`. Losses are
    unreduced: the trainer multiplies by the weights, adds the SFT term, sums, and divides once by the prompts.
    """

    name: str
    """As in objective.loss."""
    function: Callable[..., Any]
    """The equation."""
    needs: tuple[str, ...]
    """Inputs of the function, in the order of its arguments."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """Options by name. `rpo_alpha`, where it is one, is the weight of an SFT term beside the loss."""
    start: Callable[[Mapping[str, Any]], float | None] = lambda options: None
    """The loss of every item while policy == reference, SFT term left out, from the complete options: a run must start
    from this number. None where it depends on the data."""
    unit: Unit = Unit.PAIRS
    """One loss term per pair, triple, or response."""
    reads_reference: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether the reference is read under these options; None: wherever `needs` names it. Where it is not read, the
    function is given None for it."""

    def uses_reference(self, options: Mapping[str, Any]) -> bool:
        """Whether reference log-probabilities are read under these (complete) options."""
        if self.reads_reference is not None:
            return self.reads_reference(options)
        return "reference" in self.needs

    @property
    def defaults(self) -> dict[str, float | bool | str | None]:
        """Option -> default."""
        return {name: option.default for name, option in self.options.items()}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics that `terms.preference_terms` gives.

        accuracy and margin compare the responses that the loss compares: chosen and rejected, RLOO's best and worst of
        a group (its implicit rewards are h, log pi without a reference), WRPO's y_wt and y_l. Single responses are
        judged one by one: their margin is a difference of means, and there is no accuracy.
        """
        accuracy = () if self.unit is Unit.SINGLE_RESPONSES else ("accuracy",)
        return accuracy + COMMON_METRICS + LENGTH_METRICS

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every option of the loss: the given ones, checked, and defaults for the rest.

        Raises:
            ValueError: an option the loss does not read, a required one missing, or a value out of range.
        """
        for name in given:
            if name not in self.options:
                near = _nearest(name, list(self.options))
                raise ValueError(f"loss {self.name} does not use the option {name!r}{near}; remove it")
        options = {**self.defaults, **given}
        for name, value in options.items():
            if value is None:
                raise ValueError(f"loss {self.name} needs the option {name!r}: give a value, e.g. {name}=0.1")
            if not self.options[name].holds(value):
                raise ValueError(f"loss {self.name}: {name}={value!r} must be {self.options[name].rule}")
        return options


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {match[0]!r}?" if match else ""
    return f"{hint} (it has: {', '.join(known)})"
