"""The experiment's table (rich) and plot (matplotlib) from the scores `evaluate.py` returns.

A score is one dictionary of `evaluate.score_answers`; `scores` maps a row's name to it, in the order of the rows.
"""

from __future__ import annotations

from pathlib import Path

from skills import SKILLS


def build_table(scores: dict[str, dict], title: str = "Exact-match accuracy on held-out prompts, %"):
    """A rich Table: one row per model, one column per skill, the mean with its 95 % interval, the number of prompts.

    The best figure of each column is bold.
    """
    from rich.table import Table

    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    for skill in SKILLS:
        table.add_column(skill, justify="right")
    table.add_column("mean [95 %]", justify="right", no_wrap=True)
    table.add_column("prompts", justify="right")
    best = {skill: max(score["skills"][skill] for score in scores.values()) for skill in SKILLS}
    best_mean = max(score["mean"] for score in scores.values())
    for name, score in scores.items():
        cells = []
        for skill in SKILLS:
            cell = f"{100 * score['skills'][skill]:.1f}"
            cells.append(f"[bold]{cell}[/bold]" if score["skills"][skill] == best[skill] else cell)
        low, high = score["interval"]
        mean = f"{100 * score['mean']:.1f} \\[{100 * low:.1f}, {100 * high:.1f}]"
        cells.append(f"[bold]{mean}[/bold]" if score["mean"] == best_mean else mean)
        table.add_row(name, *cells, str(score["num_prompts"]))
    return table


def print_table(scores: dict[str, dict], title: str = "Exact-match accuracy on held-out prompts, %") -> None:
    """Print `build_table` on standard output, never narrower than the table needs in a log."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(build_table(scores, title))


def markdown_table(scores: dict[str, dict]) -> str:
    """The same table as GitHub markdown, for a README."""
    lines = [
        "| model | " + " | ".join(SKILLS) + " | mean [95 %] | prompts |",
        "|---|" + "---:|" * (len(SKILLS) + 2),
    ]
    for name, score in scores.items():
        low, high = score["interval"]
        cells = [f"{100 * score['skills'][skill]:.1f}" for skill in SKILLS]
        cells += [f"{100 * score['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]", str(score["num_prompts"])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_plot(scores: dict[str, dict], path: str | Path, title: str = "FuseRL on six small skills") -> None:
    """Draw accuracies and save them to `path` (png, pdf or svg).

    Left: the mean of every model with its 95 % interval. Right: every model's accuracy per skill as a shaded grid, so
    that one sees which source is good at what and that the fused model has taken over all of it.
    """
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    import matplotlib.pyplot as plt

    names = list(scores)
    means = [100 * scores[name]["mean"] for name in names]
    errors = [
        [100 * (scores[name]["mean"] - scores[name]["interval"][0]) for name in names],
        [100 * (scores[name]["interval"][1] - scores[name]["mean"]) for name in names],
    ]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 0.45 * len(names) + 1.8), width_ratios=(1, 1.25), sharey=True, layout="constrained"
    )
    colours = ["tab:green" if mean == max(means) else "tab:blue" for mean in means]
    rows = range(len(names))
    left.barh(rows, means, xerr=errors, color=colours, alpha=0.8, capsize=3, error_kw={"elinewidth": 1})
    left.set_yticks(rows, names)
    left.set_xlim(0, 108)
    left.set_xlabel("mean exact-match accuracy, % (bars: 95 % interval)")
    for row, mean in zip(rows, means, strict=True):
        left.text(2, row, f"{mean:.1f}", va="center", ha="left", fontsize=9, color="white", fontweight="bold")
    grid = [[100 * scores[name]["skills"][skill] for skill in SKILLS] for name in names]
    right.imshow(grid, vmin=0, vmax=100, cmap="Greens", aspect="auto")  # first row on top; the bars share the axis
    right.set_xticks(range(len(SKILLS)), SKILLS)
    right.set_xlabel("accuracy per skill, %")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            colour = "white" if value > 60 else "black"
            right.text(column, row, f"{value:.0f}", va="center", ha="center", fontsize=9, color=colour)
    num_prompts = next(iter(scores.values()))["num_prompts"]
    figure.suptitle(f"{title} ({num_prompts} held-out prompts)")
    figure.savefig(path, dpi=130)
    plt.close(figure)
