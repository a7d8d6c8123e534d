"""The arrows between the rooms (docs: one room per idea, Megatron in one of them), read off the source with ast."""

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fuserl_megatron"
FREE = ("util.errors", "data.manifest")
"""Plain data without torch that any room may read: the error for users, a data set's manifest."""
MAY_IMPORT = {
    "util": set(),
    "config": {"objectives", "util"},  # the table of losses, inside functions: it brings torch
    "objectives": set(),
    "checkpoint": {"util"},
    "convert": {"config", "checkpoint", "util"},
    "data": {"config", "objectives", "util"},
    "records": {"config", "objectives", "data", "util"},
    "making": {"config", "records", "runtime", "util"},
    "runtime": {"config", "metrics", "util"},
    "metrics": {"config", "convert", "objectives", "util"},
    "mcore": {"config", "objectives", "checkpoint", "convert", "data", "runtime", "util"},
    "train": {
        "config",
        "objectives",
        "data",
        "records",
        "checkpoint",
        "convert",
        "mcore",
        "runtime",
        "metrics",
        "util",
    },
    "proofs": {"config", "objectives", "data", "checkpoint", "convert", "mcore", "train", "runtime", "metrics", "util"},
    "plan": {"config", "convert", "data", "metrics", "objectives", "util"},
    "launch": {"config", "util"},  # nemo is looked up by name
    "nemo": {"config", "launch", "util"},
    "testing": {"config", "objectives", "mcore", "util"},
    "cli": None,  # may import everything; nothing imports it, nor library.py
}
TORCH_ONLY = {"torch"} | set(sys.stdlib_module_names)


def imported_names(tree: ast.AST, module: str) -> Iterator[str]:
    """Every module named in an import statement, anywhere in the file, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """What `module` (a dotted name) imports against the rules."""
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else ""
    found = []
    for name in imported_names(ast.parse(source), module):
        top, *rest = name.split(".")
        if top == "megatron" and room != "mcore":
            found.append(f"{module}: megatron outside mcore")
        if room == "objectives" and top != "fuserl_megatron" and top not in TORCH_ONLY:
            found.append(f"{module}: {top} in pure mathematics")
        if top != "fuserl_megatron" or not rest:
            continue
        if rest[0] == "library" and module != "fuserl_megatron":
            found.append(f"{module}: nothing imports the library")
        target, path = rest[0], ".".join(rest)
        allowed = MAY_IMPORT.get(room)
        if allowed is not None and target in MAY_IMPORT and target != room and target not in allowed:
            if not any(path == free or path.startswith(f"{free}.") for free in FREE):
                found.append(f"{module}: {room} may not import {path}")
    return found


def modules() -> dict[str, Path]:
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def test_every_room_has_a_rule():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert rooms == set(MAY_IMPORT)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "library"}


def test_no_import_breaks_a_rule():
    found = [line for module, path in modules().items() for line in violations(module, path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fuserl_megatron.train.loop", "from megatron.core import parallel_state"),
        ("fuserl_megatron.data.batch", "def f():\n    import megatron.core"),
        ("fuserl_megatron.objectives.weights", "import numpy"),
        ("fuserl_megatron.objectives.weights", "from fuserl_megatron.data import batch"),
        ("fuserl_megatron.config.load", "from ..convert import hf_config"),
        ("fuserl_megatron.convert.hf_io", "from fuserl_megatron import mcore"),
        ("fuserl_megatron.launch.ranks", "import fuserl_megatron.train.loop"),
        ("fuserl_megatron.records.build", "from fuserl_megatron.cli import main"),
        ("fuserl_megatron.train.loop", "from fuserl_megatron.library import build"),
        ("fuserl_megatron.util.json_files", "from fuserl_megatron.config import keys"),
    ],
)
def test_the_checker_finds_a_planted_violation(module, line):
    assert len(violations(module, line)) >= 1


def test_user_error_is_free_for_all():
    assert violations("fuserl_megatron.objectives.weights", "from fuserl_megatron.util.errors import UserError") == []


def loaded_by(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after `statement`."""
    heavy = "('torch', 'megatron', 'transformers', 'hydra')"
    code = f"{statement}\nimport sys\nprint(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_package_and_command_line_load_nothing_heavy():
    assert (
        loaded_by("import fuserl_megatron, fuserl_megatron.library, fuserl_megatron.cli, fuserl_megatron.launch.ranks")
        == set()
    )


def test_config_loads_without_torch():
    config = [name for name in modules() if name.startswith("fuserl_megatron.config")]
    assert loaded_by("import " + ", ".join(config)) == set()


def test_pure_rooms_leave_megatron_and_transformers_out():
    rooms = ("objectives", "data", "convert", "config", "making")
    pure = [name for name in modules() if name.startswith(tuple(f"fuserl_megatron.{room}" for room in rooms))]
    assert len(pure) > 20
    assert loaded_by("import " + ", ".join(pure)) <= {"torch"}


def test_every_module_imports():
    for name in modules():
        importlib.import_module(name)


def test_packages_in_pyproject_are_the_folders():
    expected = {name for name, path in modules().items() if path.name == "__init__.py"}
    expected |= {"fuserl_megatron.conf", "fuserl_megatron.slurm"}
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(setuptools["packages"]) == expected
