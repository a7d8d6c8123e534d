"""Choose every method's rates: six tries each on the development seed and its own held-out prompts. All are kept.

    python examples/noisy/search.py --dir runs/noisy

What is there already is not repeated. The table of tries goes to results/search.jsonl only with --keep.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from methods import DEVELOPMENT_SEED, METHODS, RESULTS  # noqa: E402
from runs import Seed, quiet_and_single_threaded  # noqa: E402


def main() -> int:
    """Run every try, in an order in which each method finds the best start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="runs/noisy", type=Path)
    parser.add_argument("--keep", action="store_true", help="write results/search.jsonl, the rates of all later runs")
    options = parser.parse_args()
    quiet_and_single_threaded()
    seed = Seed(options.dir.resolve(), "noisy", DEVELOPMENT_SEED)
    seed.tries.update({key: line["accuracy"] for key, line in seed.lines.items()})
    for name, method in METHODS.items():
        for rates in method.tries:
            seed.tries[name, rates] = seed.result(name, rates)["accuracy"]
    if options.keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "search.jsonl").write_text(seed.file.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
