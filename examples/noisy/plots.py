"""Draw the results: points with intervals, the sweep of tau, the phase diagram.

python examples/noisy/plots.py [--results runs/noisy/results.jsonl] [--phase runs/noisy/phase.jsonl] [--out DIR]
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from methods import METHODS, RESULTS, SWEEP  # noqa: E402
from table import FUSERL, by_seed, half_width, read  # noqa: E402

AT_ZERO, AT_INFINITY = 0.12, 30.0  # where the axis of tau shows them


def mean_and_half(lines: list[dict], name: str) -> tuple[float, float]:
    """Of a method's accuracies."""
    values = [line["accuracy"] for line in by_seed(lines, name).values()]
    return statistics.mean(values), half_width(values) or 0.0


def draw_points(plt, lines: list[dict], out: Path) -> None:
    """Every method's mean with its interval, the best below."""
    names = [name for name in ["target", *METHODS] if ", tau" not in name and by_seed(lines, name)]
    names.sort(key=lambda name: mean_and_half(lines, name)[0])
    figure, axes = plt.subplots(figsize=(7.5, 0.27 * len(names) + 0.9), layout="constrained")
    for row, name in enumerate(names):
        mean, half = mean_and_half(lines, name)
        colour = "tab:red" if name == FUSERL else "tab:blue" if "Fuse" in name else "tab:gray"
        axes.errorbar(mean, row, xerr=half, fmt="o", color=colour, capsize=3, markersize=4)
        values = [line["accuracy"] for line in by_seed(lines, name).values()]
        axes.plot(values, [row] * len(values), "|", color=colour, alpha=0.4)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("held-out prompts answered rightly, % (bars: 95 % of the mean over 12 seeds; strokes: seeds)")
    axes.xaxis.label.set_fontsize(8)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(out / "points.png", dpi=90)


def draw_sweep(plt, lines: list[dict], out: Path) -> None:
    """Accuracy by temperature for the first stage and for both."""
    rule = statistics.mean(line["tau"] for line in by_seed(lines, "FuseSFT").values())
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    ends = {
        "both stages": ("SFT(best) + DPO", FUSERL, "uniform SFT + uniform DPO", "FuseSFT + FusePO-DPO, tau {:g}"),
        "FuseSFT": ("SFT(best)", "FuseSFT", "uniform SFT", "FuseSFT, tau {:g}"),
    }
    for label, (best, fused, uniform, pattern) in ends.items():
        places = {AT_ZERO: best, rule: fused, AT_INFINITY: uniform, **{tau: pattern.format(tau) for tau in SWEEP}}
        taus = [tau for tau in sorted(places) if by_seed(lines, places[tau])]
        means, halves = zip(*(mean_and_half(lines, places[tau]) for tau in taus), strict=True)
        axes.errorbar(taus, means, yerr=halves, fmt="o-", capsize=3, markersize=4, label=label)
    axes.axvline(rule, color="tab:green", linestyle="--", label=f"the rule: {rule:.2f}")
    axes.set_xscale("log")
    ticks = [AT_ZERO, *SWEEP, rule, AT_INFINITY]
    axes.set_xticks(ticks, ["0 (best)", *(f"{tau:g}" for tau in SWEEP), f"{rule:.1f}", "inf (uniform)"], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("reward_temperature")
    axes.set_ylabel("right, %")
    axes.legend(fontsize=8)
    figure.savefig(out / "sweep.png", dpi=90)


def draw_phases(plt, lines: list[dict], out: Path) -> None:
    """FuseRL minus three others by habit and noise, in the student's worlds."""
    worlds = [line for line in lines if line["sources"] == 4]
    habits, noises = (list(dict.fromkeys(line[key] for line in worlds)) for key in ("habit", "noise"))
    others = ("FuseSFT + more FuseSFT", "SFT(best) + DPO", "uniform SFT + uniform DPO")
    figure, panels = plt.subplots(1, 3, figsize=(9.5, 3), sharey=True, layout="constrained")
    for axes, other in zip(panels, others, strict=True):
        grid = [[0.0] * len(noises) for _ in habits]
        for line in worlds:
            gains = [a - b for a, b in zip(line[FUSERL], line[other], strict=True)]
            row, column = habits.index(line["habit"]), noises.index(line["noise"])
            mean, half = statistics.mean(gains), half_width(gains)
            grid[row][column] = mean
            axes.text(column, row, f"{mean:+.1f}\n±{half:.1f}", ha="center", va="center", fontsize=7)
        axes.imshow(grid, cmap="RdBu", vmin=-12, vmax=12, aspect="auto")
        axes.set_xticks(range(len(noises)), [f"{noise:g}" for noise in noises])
        axes.set_yticks(range(len(habits)), [f"{habit:g}" for habit in habits])
        axes.set_title(f"FuseRL minus {other}", fontsize=8)
        axes.set_xlabel("noise of the reward", fontsize=8)
    panels[0].set_ylabel("share of the wrong habit", fontsize=8)
    figure.savefig(out / "phases.png", dpi=90)


def main() -> int:
    """Draw all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=RESULTS / "results.jsonl", type=Path)
    parser.add_argument("--phase", default=RESULTS / "phase.jsonl", type=Path)
    parser.add_argument("--out", default=RESULTS, type=Path)
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read(options.results)
    draw_points(plt, lines, options.out)
    draw_sweep(plt, lines, options.out)
    draw_phases(plt, [json.loads(line) for line in options.phase.read_text().splitlines()], options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
