"""The files of figures in a run's directory: their names, and what they hold, read back for reports."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuserl_megatron.config.keys import leaves
from fuserl_megatron.util.errors import UserError

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"
"""One line a step; one line a validation."""


@dataclass(frozen=True)
class Run:
    """What a run has left in its directory."""

    name: str
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    settings: dict[str, Any]
    data: dict[str, Any]
    evaluation: dict[str, Any]

    @classmethod
    def read(cls, directory: str | Path) -> "Run":
        """Read a run's files; those that are not there yet are empty.

        Raises:
            UserError: it is not the directory of a run.
        """
        import yaml

        root = Path(directory)
        if not (root / METRICS).is_file() and not (root / "evaluation.json").is_file():
            raise UserError(f"{directory}: no {METRICS} and no evaluation.json, so not the run.results_dir of a run.")
        config = root / "config.yaml"
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
        return cls(
            name=root.name if root.name not in ("", ".") else str(root.resolve().name),
            steps=_lines(root / METRICS),
            validations=_lines(root / VALIDATION),
            settings=dict(leaves(settings or {})),
            data=_object(root / "data_manifest.json"),
            evaluation=_object(root / "evaluation.json"),
        )


def _lines(file: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; of a step that was done again after a resume the last one, and a torn line left out."""
    found: dict[Any, dict[str, Any]] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                found.pop(record["step"], None)
                found[record["step"]] = record
    return [found[step] for step in sorted(found)]


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
