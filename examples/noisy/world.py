"""Worlds of noisy rewards: scripted sources answer the skills' prompts, and a reward errs on every answer on its own.

Prompts and right answers are those of ../skills. A response is an answer and two marks (256 ways, all equally right):
as in real free-form answers every text is another one, and so is the reward's error on it. Sources are not models but
dice: right, careless (the habit that the target has, too), or a slip of one character. Pure Python, a second's work.
"""

import json
import random
import re
import sys
from collections.abc import Container, Iterable
from dataclasses import dataclass
from itertools import combinations, groupby
from operator import itemgetter
from pathlib import Path

SKILLS_FOLDER = Path(__file__).resolve().parents[1] / "skills"
sys.path.insert(0, str(SKILLS_FOLDER))

from skills import LETTERS, SKILLS, Task, careless_answer, is_exact, make_tasks, reference_answer, reward  # noqa: E402

MARKS = ".!?;,~*^=-_/|'#%"
NUM_SOURCES, NUM_SAMPLES = 4, 4


@dataclass(frozen=True)
class World:
    """What sources and reward are like."""

    right: float
    """Probability of the right answer, mean over the skills."""
    habit: float
    """Probability of the careless answer; what is left is slips."""
    noise: float
    """Standard deviation of the reward's error, in units of the reward (1 is right)."""
    spread: float = 0.1
    """How much more often a source is right at the skills dealt to it; it is as much less so at the others together."""


WORLDS = {
    "noisy": World(0.25, 0.6, 1.2),
    "exact reward": World(0.25, 0.6, 0.02),
    "no habit": World(0.5, 0.1, 1.2),
    "strong habit": World(0.15, 0.75, 1.2, spread=0.05),
    "sources differ": World(0.25, 0.6, 1.2, spread=0.45),
}


def answer_of(response: str) -> str:
    """The response without its marks."""
    return re.sub(r"[^A-Za-z0-9]", "", response)


def is_right(prompt: str, response: str) -> bool:
    """Whether the answer is right, whatever the marks."""
    return is_exact(prompt, answer_of(response))


def is_careless(prompt: str, response: str) -> bool:
    """Whether the answer is the careless one, and wrong."""
    return answer_of(response) == careless_answer(prompt) != reference_answer(prompt)


def quality(prompt: str, response: str) -> float:
    """What a perfect reward would give, in [0, 1]."""
    return reward(prompt, answer_of(response))


def noisy_reward(world: World, seed: int, prompt: str, response: str) -> float:
    """Quality and an error that belongs to this response: the same text to the same prompt gets the same reward."""
    error = random.Random(f"{seed}/{prompt}/{response}").gauss(0, 1)
    return round(quality(prompt, response) + world.noise * error, 4)


def make_prompts(seed: str, per_skill: int, avoid: Container[str] = ()) -> list[Task]:
    """So many tasks of each skill, shuffled; the same seed gives the same ones."""
    tasks = [task for skill in SKILLS for task in make_tasks(seed, skill, per_skill, avoid)]
    random.Random(seed).shuffle(tasks)
    return tasks


def responses(world: World, seed: int, part: str, tasks: Iterable[Task]) -> list[dict]:
    """Scored records of all sources, NUM_SAMPLES each; `part` names the set, so that no two share their dice."""
    dice, records = random.Random(f"{seed}/{part}"), []
    for task in tasks:
        for source in range(NUM_SOURCES):
            own = SKILLS.index(task.skill) % NUM_SOURCES == source
            right = world.right + (world.spread if own else -world.spread / (NUM_SOURCES - 1))
            for _ in range(NUM_SAMPLES):
                response = _answer(dice, task, right, world) + dice.choice(MARKS) + dice.choice(MARKS)
                value = noisy_reward(world, seed, task.prompt, response)
                records.append(dict(prompt=task.prompt, source=f"s{source}", response=response, reward=value))
    return records


def _answer(dice: random.Random, task: Task, right: float, world: World) -> str:
    drawn = dice.random()
    if drawn < right:
        return task.answer
    if drawn < right + (1 - right) * world.habit / (1 - world.right):
        return careless_answer(task.prompt)
    place = dice.randrange(len(task.answer))
    others = [c for c in ("0123456789" if task.answer[place].isdigit() else LETTERS) if c != task.answer[place]]
    return task.answer[:place] + dice.choice(others) + task.answer[place + 1 :]


def with_shuffled_rewards(records: list[dict], seed: int) -> list[dict]:
    """The same records with the rewards of each prompt dealt out anew: a reward that knows nothing."""
    dice, shuffled = random.Random(f"{seed}/shuffled"), []
    for _, group in groupby(records, itemgetter("prompt")):
        of_prompt = list({(r["source"], r["response"]): r for r in group}.values())  # a text twice has one reward
        rewards = [r["reward"] for r in of_prompt]
        dice.shuffle(rewards)
        shuffled += [{**record, "reward": value} for record, value in zip(of_prompt, rewards, strict=True)]
    return shuffled


def reward_accuracy(world: World) -> float:
    """How often the sources' scores rank two of their best answers rightly, on 1,200 prompts used for nothing else.

    What a user measures on labelled pairs, once for a reward model, here with many labels.
    """
    right = pairs = 0
    records = responses(world, 0, "accuracy", make_prompts("noisy/accuracy", 200))
    for prompt, group in groupby(records, itemgetter("prompt")):
        best = [max(of, key=itemgetter("reward")) for _, of in groupby(group, itemgetter("source"))]
        for one, other in combinations([(r["reward"], quality(prompt, r["response"])) for r in best], 2):
            pairs += one[1] != other[1]
            right += (one[0] - other[0]) * (one[1] - other[1]) > 0
    return round(right / pairs, 3)


def write_records(path: Path, records: list[dict]) -> Path:
    """One record a line, or nothing."""
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records))
    return partial.rename(path)
