"""Ready-made rules. Each is function(prompt, response, record, **arguments) -> number, as one of your own would be.

What an answer is compared with comes from the record: `field` is a dotted path, such as meta.answer. All give 1 for
right and 0 for wrong unless they say otherwise. Imports nothing at the start but the standard library.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

QUOTES = "\"'`*\u201c\u201d\u2018\u2019"
NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?\$?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?%?")
ANSWER_MARKS = (
    r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}",
    r"####\s*(.+)",
    r"(?i)answer(?:\s+is)?\s*:?\s*\**\s*(.+?)\**\s*$",
)


def exact(prompt: Any, response: str, record: dict, field: str = "meta.answer", extract: bool = True) -> float:
    """1 where the answer is the expected text, but for case, outer white space, quotes and the full stop.

    Args:
        prompt: not read.
        response: the whole answer, or with `extract` also what stands in \\boxed{}, behind #### or behind "answer:".
        record: holds the expected text, or a list of texts of which one must match.
        field: where.
        extract: look for a marked final answer first.
    """
    expected = lookup(record, field)
    texts = [response, *([final_answer(response)] if extract else [])]
    wanted = {_plain(str(text)) for text in (expected if isinstance(expected, list) else [expected])}
    return float(any(_plain(text) in wanted for text in texts))


def numeric(prompt: Any, response: str, record: dict, field: str = "meta.answer", tolerance: float = 1e-6) -> float:
    """1 where the answer's final number (marked, else the last one in it) is the expected one.

    Args:
        prompt: not read.
        response: may hold 1,234.5, 3/4, 12%, $5 or 1e3.
        record: holds a number, or text with one.
        field: where.
        tolerance: largest relative difference.
    """
    wanted = _last_number(str(lookup(record, field)))
    if wanted is None:
        raise ValueError(f"{field} holds no number: {str(lookup(record, field))[:60]!r}")
    found = _last_number(final_answer(response))
    if found is None:
        found = _last_number(response)
    return float(found is not None and abs(found - wanted) <= tolerance * max(1.0, float(abs(wanted))))


def matches(prompt: Any, response: str, record: dict, pattern: str, whole: bool = True) -> float:
    """1 where the regular expression fits the answer (. fits line ends too).

    Args:
        prompt: not read.
        response: white space around it does not count.
        record: not read.
        pattern: such as (?s)<think>.*</think>.+
        whole: the whole answer must fit, not a part.
    """
    fits = (re.fullmatch if whole else re.search)(pattern, response.strip(), re.DOTALL)
    return float(fits is not None)


def is_json(prompt: Any, response: str, record: dict, keys: Sequence[str] = ()) -> float:
    """1 where the answer, or its one fenced block, is a JSON object with all these keys (or any JSON without keys)."""
    fenced = re.findall(r"```(?:json)?\s*\n(.*?)```", response, re.DOTALL)
    try:
        found = json.loads(fenced[0] if len(fenced) == 1 else response)
    except (ValueError, RecursionError):
        return 0.0
    return float(not keys or isinstance(found, dict) and set(keys) <= set(found))


def keywords(
    prompt: Any,
    response: str,
    record: dict,
    required: Sequence[str] = (),
    forbidden: Sequence[str] = (),
    field: str | None = None,
) -> float:
    """Share of the required words or phrases that the answer has; 0 with a forbidden one. Case does not count.

    Args:
        prompt: not read.
        response: the answer.
        record: with `field`, holds more required ones (a list).
        required: must be there, as whole words.
        forbidden: must not.
        field: where.
    """
    wanted = [*required, *(lookup(record, field) if field else [])]
    if any(_has(response, word) for word in forbidden):
        return 0.0
    return sum(_has(response, str(word)) for word in wanted) / len(wanted) if wanted else 1.0


def length(
    prompt: Any, response: str, record: dict, target: int = 0, slope: float = 1.0, unit: str = "words", cap: int = 0
) -> float:
    """How well the length fits: 0 at most, and less by `slope` for every 100 units that the answer is away from it.

    Args:
        prompt: not read.
        response: the answer.
        record: not read.
        target: wanted length; 0 prefers shorter answers.
        slope: loss per 100 units; negative prefers longer answers.
        unit: words or characters.
        cap: units beyond which it gets no worse; 0: none.
    """
    size = len(response.split()) if unit == "words" else len(response)
    away = abs(size - target)
    return -slope * (min(away, cap) if cap else away) / 100


def number(prompt: Any, response: str, record: dict, field: str = "reward") -> float:
    """A number that the record has already, such as the reward of an earlier scoring."""
    return float(lookup(record, field))


def math_verify(prompt: Any, response: str, record: dict, field: str = "meta.answer") -> float:
    """1 where the `math-verify` package finds the answer equal to the expected one (`pip install math-verify`).

    Its own time limits are left out: they need signals, and the worker's limit is the one that holds.
    """
    from math_verify import parse, verify

    expected = str(lookup(record, field))
    gold = parse(expected if "$" in expected or "\\boxed" in expected else f"${expected}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"{field} cannot be read as mathematics: {expected[:60]!r}")
    return float(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))


def if_verifiable(
    prompt: Any,
    response: str,
    record: dict,
    benchmark: str = "ifeval",
    field: str = "meta",
    score: str = "partial_strict",
) -> dict[str, float]:
    """How many of a prompt's instructions the answer follows, by the `if-verifiable` package.

    Args:
        prompt: some instructions ask for it again in the answer.
        response: the answer.
        record: holds instruction_id_list and kwargs, as IFEval's and IFBench's data sets have them.
        benchmark: ifeval or ifbench, whose instructions these are.
        field: where the two lie.
        score: partial_strict, partial_loose, binary_strict or binary_loose; the others come along as parts.
    """
    import importlib

    from if_verifiable.common import evaluate_instructions
    from langdetect import DetectorFactory

    DetectorFactory.seed = 0  # it guesses languages at random otherwise
    known = importlib.import_module(f"if_verifiable.{benchmark}.instructions_registry").INSTRUCTION_DICT
    names = list(lookup(record, f"{field}.instruction_id_list"))
    if lost := [name for name in names if name not in known]:
        raise ValueError(f"{benchmark} has no instruction {lost[0]}")
    kwargs = list(lookup(record, f"{field}.kwargs"))
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    scores = vars(evaluate_instructions(response, names, kwargs, text, known)[1])
    return {"reward": scores[score], **scores}


def lookup(record: dict, field: str) -> Any:
    """What the record holds under a dotted path.

    Raises:
        KeyError: nothing is there.
    """
    found: Any = record
    for name in field.split("."):
        if isinstance(found, str):  # parquet files often hold `meta` as the text of an object
            found = json.loads(found)
        if not isinstance(found, dict) or found.get(name) is None:
            raise KeyError(f"the record has no {field}")
        found = found[name]
    return found


def final_answer(response: str) -> str:
    """What is marked as the answer, the last mark of the strongest kind; the whole text without one."""
    for mark in ANSWER_MARKS:
        if found := re.findall(mark, response, re.MULTILINE):
            return found[-1].strip()
    return response


def _last_number(text: str) -> Fraction | None:
    found = NUMBER.findall(text)
    if not found:
        return None
    plain = found[-1].replace(",", "").replace("$", "").replace("\u2212", "-").replace(" ", "")
    try:
        number = Fraction(plain.rstrip("%"))
    except (ValueError, ZeroDivisionError):
        return None
    return number / 100 if plain.endswith("%") else number


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    return " ".join(text.lstrip(QUOTES).rstrip(f"{QUOTES}.").split())


def _has(response: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", response, re.IGNORECASE) is not None
