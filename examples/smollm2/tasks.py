"""Eight families of short instructions whose answers a rule can check, and the rules.

Every rule gives two numbers in [0, 1]: `form` (was the instruction about the shape of the answer obeyed?) and
`content` (is it the right answer, or about the right thing?). The reward is

    0.3 * form + 0.2 * content + 0.5 * form * content,

so half of it is earned only by doing both. A response without a single letter or digit has reward 0, and a response
that was cut off before the model ended its turn keeps CUT_OFF_FACTOR of its reward.

Prompts of the three splits ("sft", "po", "heldout") share no question, list item, topic or word to use: each list of
`topics.py` is cut in three.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from topics import FACTS, ITEMS, NUMBERS, TOPICS, WORDS, YES_NO

SPLITS = {"sft": 0.4, "po": 0.4, "heldout": 0.2}
CUT_OFF_FACTOR = 0.3
EXACT_FAMILIES = ("one_word", "number", "yes_no", "bullets")
WRITING_FAMILIES = ("capitals", "contains", "ending", "at_most")
FAMILIES = EXACT_FAMILIES + WRITING_FAMILIES


@dataclass(frozen=True)
class Task:
    """One prompt and the argument its rule needs.

    Attributes:
        family: one of FAMILIES.
        prompt: what the user asks.
        expected: the right answers, items, or topic and word that the rule looks for.
    """

    family: str
    prompt: str
    expected: tuple[str, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as chat messages, without any help."""
        return [{"role": "user", "content": self.prompt}]


def words_of(text: str) -> list[str]:
    """Returns the lower-case words and numbers of `text`."""
    return re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", text.lower())


def _mentions(text: str, name: str) -> bool:
    """Whether a word of `text` is `name`, in the singular or the plural."""
    stem = name.lower().removesuffix("s")
    return any(word == name.lower() or word in (stem, stem + "s", stem + "es") for word in words_of(text))


def _is_about(text: str, topic: str) -> bool:
    """Whether `text` mentions `topic`, or a longer word that starts with it (chessboard for chess)."""
    stem = topic.lower().removesuffix("s")
    return _mentions(text, topic) or (len(stem) >= 4 and any(word.startswith(stem) for word in words_of(text)))


def _is_sentence(text: str, low: int, high: int) -> bool:
    """Whether `text` is one line of `low` to `high` words with no two equal words in a row."""
    words = words_of(text)
    repeats = any(a == b for a, b in zip(words, words[1:], strict=False))
    return "\n" not in text and low <= len(words) <= high and not repeats


def _one_word(text: str, expected: tuple[str, ...]) -> tuple[float, float]:
    count = len(words_of(text))
    form = 1.0 if count == 1 else 0.5 if count <= 3 else 0.0
    return form, float(count <= 20 and any(_mentions(text, answer) for answer in expected))


def _number(text: str, expected: tuple[str, ...]) -> tuple[float, float]:
    numbers = re.findall(r"\d+", text.replace(",", ""))
    form = 1.0 if re.fullmatch(r"\d+\.?", text) else 0.5 if numbers and len(words_of(text)) <= 4 else 0.0
    return form, float(set(numbers) == set(expected))


def _yes_no(text: str, expected: tuple[str, ...]) -> tuple[float, float]:
    words = words_of(text)
    form = 1.0 if words in (["yes"], ["no"]) else 0.5 if words[0] in ("yes", "no") and len(words) <= 6 else 0.0
    return form, float(words[0] == expected[0])


def _bullets(text: str, expected: tuple[str, ...]) -> tuple[float, float]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    good = [line for line in lines if re.match(r"- \w", line) and len(words_of(line)) <= 3]
    form = len(good) / max(len(lines), len(expected))
    found = sum(any(_mentions(line, item) for line in lines) for item in expected) / len(expected)
    return form, found


def _capitals(text: str, expected: tuple[str, ...]) -> tuple[float, float]:
    letters = [letter for letter in text if letter.isalpha()]
    share = sum(letter.isupper() for letter in letters) / max(1, len(letters))
    form = 1.0 if share == 1.0 else 0.5 if share >= 0.8 else 0.0
    found, asked = words_of(text), set(expected)
    return form, len(asked & set(found)) / max(len(asked), len(found))


def _contains(text: str, expected: tuple[str, ...]) -> tuple[float, float]:
    topic, word = expected
    sentence = _is_sentence(text, 4, 25)
    return (0.5 + 0.5 * sentence) * (word in words_of(text)), 0.5 * sentence + 0.5 * _is_about(text, topic)


def _ending(text: str, expected: tuple[str, ...]) -> tuple[float, float]:
    topic, end = expected
    sentence = _is_sentence(text, 4, 25)
    return (0.5 + 0.5 * sentence) * text.endswith(end), 0.5 * sentence + 0.5 * _is_about(text, topic)


def _at_most(text: str, expected: tuple[str, ...]) -> tuple[float, float]:
    topic, limit = expected
    count, limit = len(words_of(text)), int(limit)
    form = 0.0 if count < 3 else 1.0 if count <= limit else 0.5 if count <= 1.5 * limit else 0.0
    return form * (1.0 if _is_sentence(text, 1, 99) else 0.5), float(_is_about(text, topic))


RULES: dict[str, Callable[[str, tuple[str, ...]], tuple[float, float]]] = {
    "one_word": _one_word,
    "number": _number,
    "yes_no": _yes_no,
    "bullets": _bullets,
    "capitals": _capitals,
    "contains": _contains,
    "ending": _ending,
    "at_most": _at_most,
}


def reward(task: Task, response: str, cut_off: bool = False) -> float:
    """Scores a response in [0, 1] by the family's rule.

    Args:
        task: the prompt and what its rule looks for.
        response: the text without the end-of-turn token.
        cut_off: the model had not ended its turn when the token limit was reached.
    """
    text = response.strip()
    if not words_of(text):
        return 0.0
    form, content = RULES[task.family](text, task.expected)
    score = 0.3 * form + 0.2 * content + 0.5 * form * content
    return round(score * (CUT_OFF_FACTOR if cut_off else 1.0), 4)


def _split(entries: list, split: str, seed: str) -> list:
    """Returns the part of `entries` that belongs to `split`, shuffled by a fixed seed."""
    entries = list(entries)
    random.Random(seed).shuffle(entries)
    start = 0.0
    for name, share in SPLITS.items():
        if name == split:
            return entries[round(start * len(entries)) : round((start + share) * len(entries))]
        start += share
    raise ValueError(f"split {split!r}: choose one of {', '.join(SPLITS)}")


def _pairs(table: str) -> list[tuple[str, tuple[str, ...]]]:
    rows = [line.rsplit(" = ", 1) for line in table.strip().splitlines()]
    return [(question, tuple(answer.split("/"))) for question, answer in rows]


def make_tasks(split: str, per_family: int) -> list[Task]:
    """Returns `per_family` prompts of each family, mixed, the same on every call.

    Args:
        split: "sft", "po" or "heldout".
        per_family: prompts of each family; at most what the lists in `topics.py` allow.

    Raises:
        ValueError: an unknown split, or more prompts than the lists allow.
    """
    rng = random.Random(f"prompts of {split}")
    facts = _split(_pairs(FACTS), split, "facts")
    items, topics, words = (
        _split(entries, split, name) for entries, name in ((ITEMS, "items"), (TOPICS, "topics"), (WORDS, "words"))
    )
    made: dict[str, list[Task]] = {family: [] for family in FAMILIES}
    for question, answers in facts:
        text = rng.choice((f"{question} Answer with exactly one word.", f"Answer with one word only: {question}"))
        made["one_word"].append(Task("one_word", text, answers))
    for question, answers in _split(_pairs(NUMBERS), split, "numbers") + _counts(items, 10, rng):
        text = rng.choice((f"{question} Answer with only the number.", f"Give just a number: {question}"))
        made["number"].append(Task("number", text, answers))
    for question, answers in _split(_pairs(YES_NO), split, "yes or no"):
        text = rng.choice((f"{question} Answer only yes or no.", f"Yes or no: {question}"))
        made["yes_no"].append(Task("yes_no", text, answers))
    for index in range(per_family):
        chosen = tuple(rng.sample(items, rng.choice((3, 3, 4))))
        text = rng.choice(("Write this as a list with '- ' bullets: ", "Turn this into '- ' bullet points: "))
        made["bullets"].append(Task("bullets", text + ", ".join(chosen) + ".", chosen))
        made["capitals"].append(_capital_letters(items, words, rng))
        made["contains"].append(_writing("contains", topics, words, index, rng))
        made["ending"].append(_writing("ending", topics, words, index, rng))
        made["at_most"].append(_writing("at_most", topics, words, index, rng))
    for family, tasks in made.items():
        if len(tasks) < per_family:
            raise ValueError(f"split {split!r}: {family} has only {len(tasks)} prompts, {per_family} asked for")
    mixed = [task for tasks in made.values() for task in rng.sample(tasks, per_family)]
    rng.shuffle(mixed)
    return mixed


def _counts(items: list[str], count: int, rng: random.Random) -> list[tuple[str, tuple[str, ...]]]:
    """Returns questions whose answer stands in the question."""
    made = []
    plurals = [item for item in items if item.endswith("s")]
    for _ in range(count):
        (first, second), (a, b) = rng.sample(plurals, 2), rng.sample(range(3, 100), 2)
        asked, answer = rng.choice(((first, a), (second, b)))
        made.append((f"Ann has {a} {first} and {b} {second}. How many {asked} does Ann have?", (str(answer),)))
    return made


def _capital_letters(items: list[str], words: list[str], rng: random.Random) -> Task:
    """Returns a prompt to write a few words in capital letters."""
    (first, second), word = rng.sample(items, 2), rng.choice(words)
    phrase = rng.choice((f"we need {first} and {second}", f"{word} {first}", f"I see {first} but no {second}"))
    return Task("capitals", f"Write this in all capital letters: {phrase}.", tuple(words_of(phrase)))


def _writing(family: str, topics: list[str], words: list[str], index: int, rng: random.Random) -> Task:
    """Returns the `index`-th prompt of a writing family; topics are taken in turn, from a different start in each."""
    topic = topics[(index + 5 * WRITING_FAMILIES.index(family)) % len(topics)]
    if family == "contains":
        word = words[index % len(words)]
        return Task(family, f"Write one sentence about {topic} that uses the word '{word}'.", (topic, word))
    if family == "ending":
        end = rng.choice(("!", "!", "...", "Goodbye."))
        told = {"!": "an exclamation mark", "...": "three dots (...)", "Goodbye.": "the word 'Goodbye.'"}[end]
        return Task(family, f"Write one sentence about {topic}. End it with {told}.", (topic, end))
    limit = rng.choice((6, 7, 8))
    return Task(family, f"Write a sentence about {topic} with at most {limit} words.", (topic, str(limit)))
