"""All methods over the twelve seeds, then the neighbouring worlds over the first six; one JSON line a training.

    python examples/noisy/compare.py --dir runs/noisy --workers 2
    python examples/noisy/compare.py --dir runs/noisy --parts "no habit" "strong habit"   # not in results/

What is there already is not repeated, so that a run that was stopped goes on. The rates are those that search.py
found. The lines, in a fixed order, end up in DIR/results.jsonl, from which table.py and plots.py work.
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from methods import METHODS, SEEDS, read_tries  # noqa: E402
from runs import WORLDS, Seed, quiet_and_single_threaded  # noqa: E402


def _of(part: str) -> list[str]:
    return [name for name, method in METHODS.items() if method.part == part]


CLAIMS = ["target", *_of("claims")]
PARTS = {
    "claims": ("noisy", CLAIMS, SEEDS),
    **{part: ("noisy", _of(part), SEEDS) for part in ("others", "sweep", "afterwards")},
    **{world: (world, CLAIMS[1:], SEEDS[:6]) for world in WORLDS if world != "noisy"},
}
"""Name -> world, methods, seeds; the order in which they are run."""
KEPT = [part for part in PARTS if part not in ("no habit", "strong habit")]
"""What results/ holds, and what is run unless others are named."""


def run_seed(place: Path, part: str, seed: int) -> None:
    """What is missing of one part and seed."""
    quiet_and_single_threaded()
    world, names, _ = PARTS[part]
    of_seed = Seed(place, world, seed, read_tries())
    for name in names:
        of_seed.result(name)


def merged(place: Path) -> list[str]:
    """All lines that are there, part by part, seed by seed, in the order of the methods."""
    lines = {}
    for part, (world, names, seeds) in PARTS.items():
        for seed in seeds:
            file = place / world.replace(" ", "_") / f"{seed}.jsonl"
            found = map(json.loads, file.read_text().splitlines() if file.exists() else [])
            of_method = {line["method"]: line for line in found}
            lines.update({(part, seed, name): of_method[name] for name in names if name in of_method})
    return [json.dumps(line) for line in lines.values()]


def main() -> int:
    """Run what is missing, write the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="runs/noisy", type=Path)
    parser.add_argument("--workers", default=2, type=int, help="processes, each of one thread (default: 2)")
    parser.add_argument("--parts", default=KEPT, nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args()
    place = options.dir.resolve()
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for part in options.parts:  # a part is finished before the next: others start from its models
            list(pool.map(run_seed, repeat(place), repeat(part), PARTS[part][2]))
            (place / "results.jsonl").write_text("".join(f"{line}\n" for line in merged(place)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
