"""Six small skills with answers a rule can check: prompts, reference answers, slips, rewards.

Every prompt is one line, `name: argument`, and every answer is one short word or number, so that tiny models can learn
the skills on a CPU and a held-out answer is right or wrong without a judge. Pure Python: importing this file costs
nothing and changes nothing.

    add: 47+38       -> 85        two-digit numbers whose sum stays below 100
    max: 23 81 45    -> 81        the largest of three two-digit numbers
    sort: gacbe      -> abceg     letters a..j in alphabetical order, four to six of them
    reverse: gacbe   -> ebcag
    count a: bacaj   -> 2         how often the letter occurs
    vowels: gacbe    -> gAcbE     a, e and i in capitals, the rest as it was
"""

from __future__ import annotations

import random
from collections.abc import Container
from dataclasses import dataclass

SKILLS = ("add", "max", "sort", "reverse", "count", "vowels")
LETTERS = "abcdefghij"
VOWELS = "aei"
PARTIAL_CREDIT = 0.6  # the most an answer that is not exact can earn


@dataclass(frozen=True)
class Task:
    """One prompt with its skill and the only answer that counts as right."""

    skill: str
    prompt: str
    answer: str


def make_task(rng: random.Random, skill: str) -> Task:
    """Draw one task of a skill from `rng`.

    Raises:
        ValueError: if `skill` is not one of SKILLS.
    """
    if skill == "add":
        first = rng.randint(10, 89)
        prompt = f"add: {first}+{rng.randint(10, 99 - first)}"
    elif skill == "max":
        prompt = "max: " + " ".join(str(rng.randint(10, 99)) for _ in range(3))
    elif skill in ("sort", "reverse", "count", "vowels"):
        word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(4, 6)))
        if skill == "count":  # half of the letters asked for do occur: otherwise "0" would be right too often
            letter = rng.choice(word) if rng.random() < 0.5 else rng.choice(LETTERS)
            word = "".join(letter if rng.random() < 0.3 else c for c in word)
            prompt = f"count {letter}: {word}"
        else:
            prompt = f"{skill}: {word}"
    else:
        raise ValueError(f"unknown skill {skill!r}; known skills: {', '.join(SKILLS)}")
    return Task(skill, prompt, reference_answer(prompt))


def make_tasks(seed: int, skill: str, num_tasks: int, avoid: Container[str] = ()) -> list[Task]:
    """Draw `num_tasks` tasks with distinct prompts, none of them in `avoid`; the same seed gives the same tasks."""
    rng = random.Random(f"{seed}/{skill}")
    tasks: dict[str, Task] = {}
    while len(tasks) < num_tasks:
        task = make_task(rng, skill)
        if task.prompt not in avoid:
            tasks.setdefault(task.prompt, task)
    return list(tasks.values())


def skill_of(prompt: str) -> str:
    """The skill a prompt asks for: its first word."""
    return prompt.split(":")[0].split()[0]


def reference_answer(prompt: str) -> str:
    """The right answer, computed from the prompt alone."""
    head, argument = prompt.split(": ")
    skill = skill_of(prompt)
    if skill == "add":
        return str(sum(int(number) for number in argument.split("+")))
    if skill == "max":
        return max(argument.split())
    if skill == "sort":
        return "".join(sorted(argument))
    if skill == "reverse":
        return argument[::-1]
    if skill == "count":
        return str(argument.count(head.split()[1]))
    if skill == "vowels":
        return "".join(c.upper() if c in VOWELS else c for c in argument)
    raise ValueError(f"unknown skill in prompt {prompt!r}; known skills: {', '.join(SKILLS)}")


def careless_answer(prompt: str) -> str:
    """What a careless person answers: plausible, sometimes right by luck. The weak target is tuned towards these."""
    argument = prompt.split(": ")[1]
    skill = skill_of(prompt)
    if skill == "add":  # forgets the tens of the second number
        first, second = argument.split("+")
        return str(int(first) + int(second) % 10)
    if skill == "max":  # takes the last number
        return argument.split()[-1]
    if skill == "sort":  # only puts the smallest letter first
        least = min(argument)
        return least + argument.replace(least, "", 1)
    if skill == "reverse":  # only swaps the two ends
        return argument[-1] + argument[1:-1] + argument[0]
    if skill == "count":  # counts the letters, whichever they are
        return str(len(argument))
    return argument[0].upper() + argument[1:]  # vowels: a capital at the front


def is_exact(prompt: str, response: str) -> bool:
    """Whether the response is the right answer, up to surrounding white space."""
    return response.strip() == reference_answer(prompt)


def reward(prompt: str, response: str) -> float:
    """Score a response in [0, 1]: 1 for the exact answer, otherwise at most PARTIAL_CREDIT.

    Partial credit is PARTIAL_CREDIT times the share of characters that are right at their place (the longer of the two
    strings counts); for `count` it falls by a third with every unit the number is off.
    """
    if is_exact(prompt, response):
        return 1.0
    answer, response = reference_answer(prompt), response.strip()
    if skill_of(prompt) == "count":
        # ASCII digits only: str.isdigit also accepts superscripts, which int() refuses
        closeness = max(0.0, 1 - abs(int(response) - int(answer)) / 3) if response in set("0123456789") else 0.0
    else:
        matches = sum(a == b for a, b in zip(answer, response, strict=False))
        closeness = matches / max(len(answer), len(response))
    return round(PARTIAL_CREDIT * closeness, 4)
