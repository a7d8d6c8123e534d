"""Paths that people mistype or mistake: what is there with a near name, and a run where a model is asked for."""

import difflib
import os
from pathlib import Path

REQUEUE = "REQUEUE"
"""What a command leaves in its directory when it was stopped to be continued (runtime/stopping.py)."""


def did_you_mean(path: str | Path) -> str:
    """The question "; did you mean models/llama?" for a path that is not there; empty where nothing near is.

    The first part that is missing is compared with what lies beside it, and the rest must exist behind the answer.
    """
    parts = Path(path).parts
    for i, part in enumerate(parts):
        before = Path(*parts[:i])
        if os.path.lexists(before / part):
            continue
        try:
            beside = sorted(os.listdir(before))
        except OSError:
            return ""
        for name in difflib.get_close_matches(part, beside, n=3, cutoff=0.65):
            found = before.joinpath(name, *parts[i + 1 :])
            if found.exists():
                return f"; did you mean {found}?"
        return ""
    return ""


def export_of_run(path: str | Path) -> str:
    """The words "; it is a run, and its model is runs/sft/hf" for the folder of a training run that has exported one
    and holds no model itself; empty for any other path."""
    exported = Path(path, "hf")
    if Path(path, "config.json").exists() or not (exported / "config.json").is_file():
        return ""
    return f"; it is a run, and its model is {exported}"
