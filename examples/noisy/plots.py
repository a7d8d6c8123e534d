"""Draw the results: points with intervals, the sweep of tau, the phase diagram. Without options: those of docs/.

python examples/noisy/plots.py [--results runs/noisy/results.jsonl] [--phase runs/noisy/phase.jsonl] [--out DIR]
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from methods import METHODS, RESULTS, SWEEP  # noqa: E402
from student import MULTIPLES  # noqa: E402
from table import FUSERL, by_seed, half_width, read  # noqa: E402

DOCS = Path(__file__).resolve().parents[2] / "docs"
AT_ZERO, AT_INFINITY = 0.07, 30.0  # where the axis of tau shows them


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
    figure.savefig(out / "noisy_points.png", dpi=90)


def draw_sweep(plt, lines: list[dict], worlds: list[dict], out: Path) -> None:
    """Accuracy by temperature: of the trainer's models, and of the student's as points below the rule's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.3), layout="constrained")
    rule = statistics.mean(line["tau"] for line in by_seed(lines, "FuseSFT").values())
    rows = {
        "FuseSFT + FusePO-DPO": ("SFT(best) + DPO", "uniform SFT + uniform DPO"),
        "FuseSFT": ("SFT(best)", "uniform SFT"),
    }
    for label, (best, uniform) in rows.items():
        places = {AT_ZERO: best, rule: label, AT_INFINITY: uniform, **{tau: f"{label}, tau {tau:g}" for tau in SWEEP}}
        taus = [tau for tau in sorted(places) if by_seed(lines, places[tau])]
        means, halves = zip(*(mean_and_half(lines, places[tau]) for tau in taus), strict=True)
        left.errorbar(taus, means, yerr=halves, fmt="o-", capsize=3, markersize=4, label=label)
    left.axvline(rule, color="tab:green", linestyle="--", label="the rule")
    ticks = {AT_ZERO: "0 (best)", **{tau: f"{tau:g}" for tau in SWEEP}, rule: f"{rule:.1f}", AT_INFINITY: "inf"}
    left.set_xlabel("reward_temperature (trainer, 12 seeds)")
    left.set_ylabel("right, %")
    for line in worlds:
        places = {AT_ZERO: "SFT(best) + DPO", 1.0: FUSERL, AT_INFINITY: "uniform SFT + uniform DPO"}
        places |= {multiple: f"{FUSERL}, rule x {multiple:g}" for multiple in MULTIPLES}
        points = [statistics.mean(line[places[m]]) - statistics.mean(line[FUSERL]) for m in sorted(places)]
        label = f"habit {line['habit']:g}, noise {line['noise']:g} (rule {line['tau']:.2f})"
        right.plot(sorted(places), points, "o-", markersize=3, linewidth=1, label=label)
    right.axvline(1, color="tab:green", linestyle="--")
    right.set_xlabel("reward_temperature in multiples of the rule's (student, 24 seeds)")
    right.set_ylabel("FuseRL minus FuseRL at the rule, points")
    of_rule = {AT_ZERO: "0", **{m: f"{m:g}" for m in (0.25, 0.5, 1, 2, 4, 8)}, AT_INFINITY: "inf"}
    for axes, named in ((left, ticks), (right, of_rule)):
        axes.set_xscale("log")
        axes.set_xticks(list(named), list(named.values()), fontsize=8)
        axes.set_xticks([], minor=True)
        axes.xaxis.label.set_fontsize(8)
        axes.yaxis.label.set_fontsize(8)
        axes.legend(fontsize=6)
    figure.savefig(out / "noisy_sweep.png", dpi=90)


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
            colour = "white" if abs(mean) > 8 else "black"
            axes.text(column, row, f"{mean:+.1f}\n±{half:.1f}", ha="center", va="center", fontsize=7, color=colour)
        axes.imshow(grid, cmap="RdBu", vmin=-12, vmax=12, aspect="auto")
        axes.set_xticks(range(len(noises)), [f"{noise:g}" for noise in noises])
        axes.set_yticks(range(len(habits)), [f"{habit:g}" for habit in habits])
        axes.set_title(f"FuseRL minus {other}", fontsize=8)
        axes.set_xlabel("noise of the reward", fontsize=8)
    panels[0].set_ylabel("share of the wrong habit", fontsize=8)
    figure.savefig(out / "noisy_phases.png", dpi=90)


def main() -> int:
    """Draw all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=RESULTS / "results.jsonl", type=Path)
    parser.add_argument("--phase", default=RESULTS / "phase.jsonl", type=Path)
    parser.add_argument("--out", default=DOCS, type=Path)
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines, worlds = read(options.results), read(options.phase)
    draw_points(plt, lines, options.out)
    draw_sweep(plt, lines, [world for world in worlds if f"{FUSERL}, rule x 2" in world], options.out)
    draw_phases(plt, worlds, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
