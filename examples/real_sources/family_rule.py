"""The reward: the rule of the prompt's family, from examples/smollm2."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "smollm2"))
from tasks import Task, reward


def score(prompt, response: str, record: dict) -> float:
    """In [0, 1]; an answer that was cut by the token limit keeps 0.3 of its reward.

    Args:
        prompt: a text, or messages of which the last one counts.
        response: the answer.
        record: the row of `fuserl sample`, with `meta` as prompts.py wrote it.
    """
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    task = Task(record["meta"]["family"], text, tuple(record["meta"]["expected"]))
    return reward(task, response, cut_off=record["finish_reason"] == "length")
