"""Check the results and print the tables of docs/results.md.

    python examples/noisy/table.py [runs/noisy/results.jsonl]

Without a file it takes the results of this repository. Intervals are 95 %, Student, over seeds; differences are paired
by seed. A file whose lines cannot be what their labels say is refused: settings, rates, data and the model before are
held against methods.py, and accuracies against the marks of the single prompts.
"""

import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from methods import METHODS, RESULTS, chosen, read_tries  # noqa: E402

STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
              11: 2.201, 23: 2.069}  # fmt: skip
"""Two-sided 95 % quantile by degrees of freedom."""
FUSERL = "FuseSFT + FusePO-DPO"
CLAIMS = (  # method, minus which, what an earlier, exploratory study had
    (FUSERL, "SFT(best) + DPO", "+5.3 ± 3.1 (12)"),
    (FUSERL, "SFT(best) + DPO, equal compute", "+16.2 ± 7.0 (4)"),
    ("FuseSFT + FusePO-SimPO", "SFT(best) + SimPO", ""),
    ("FuseSFT + FusePO-RLOO", "SFT(best) + RLOO", ""),
    ("FuseSFT + FusePO-LN-DPO", "FuseChat-3.0", ""),
    (FUSERL, "FuseChat-3.0", ""),
    (FUSERL, "FuseChat-3.0, other rates", ""),
    (FUSERL, "FuseSFT + more FuseSFT", "+5.8 ± 3.0 (12)"),
    (FUSERL, "uniform SFT + uniform DPO", "+2.3 ± 1.5 (12)"),
    (FUSERL, "FuseSFT + WRPO", "+12.1 ± 4.9 (6)"),
    (FUSERL, "FuseSFT + on-policy DPO", "+11.4 ± 3.6 (6)"),
    ("FuseSFT", "SFT(best)", "-0.1 ± 3.0 (12)"),
    ("FuseSFT", "uniform SFT", "+2.9 ± 1.3 (12)"),
    ("FuseSFT", "SFT(best), equal compute", "+6.8 ± 2.2 (4)"),
    (FUSERL, "FuseSFT + FusePO-DPO, no SFT term", "+8.0 ± 6.4 (2)"),
    ("FuseSFT, tau 0.5", "FuseSFT", ""),
    (f"{FUSERL}, tau 0.5", FUSERL, ""),
    (f"{FUSERL}, tau 8", FUSERL, ""),
    ("FuseSFT + DPO by gap", FUSERL, ""),
    ("FuseSFT + FusePO-DPO, shuffled rewards", "FuseSFT", ""),
)


def read(path: Path) -> list[dict]:
    """The lines of a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def marks(line: dict) -> list[int]:
    """1 for each held-out prompt that was answered rightly, else 0."""
    number = 4 * len(line["right"])
    return [int(digit) for digit in f"{int(line['right'], 16):0{number}b}"]


def problems(lines: list[dict], tries: dict) -> list[str]:
    """What cannot be as the labels say, a sentence each; no sentence: nothing was found."""
    found, data = [], {}
    of = {(line["world"], line["seed"], line["method"]): line for line in lines}
    targets = {line["model"] for line in lines if line["method"] == "target"}
    if len(of) != len(lines):
        found.append("a method stands twice under one seed")
    for (world, seed, name), line in of.items():
        place, right = f"{world}, seed {seed}, {name}", marks(line)
        if round(100 * sum(right) / len(right), 2) != line["accuracy"]:
            found.append(f"{place}: the accuracy is not that of its marks")
        if name == "target":
            continue
        method = METHODS[name]
        if (line.get("settings"), line["rates"]) != (" ".join(method.settings), chosen(name, tries)):
            found.append(f"{place}: was made with other settings: {line.get('settings')} {line['rates']}")
        start = of.get((world, seed, method.start))
        if line.get("start") not in ({start["model"]} if start else targets if method.start == "target" else {None}):
            found.append(f"{place}: did not start from the model of {method.start}")
        if data.setdefault((world, seed, method.data), line.get("data")) != line.get("data"):
            found.append(f"{place}: has other data than the methods it shares them with")
    if len(targets) > 1 or len({d for d in data.values()}) < len(data):
        found.append("two sets of data are one, or there are two targets")
    return found


def by_seed(lines: list[dict], name: str, world: str = "noisy") -> dict[int, dict]:
    """A method's lines."""
    return {line["seed"]: line for line in lines if (line["world"], line["method"]) == (world, name)}


def interval(values: list[float], sign: str = "") -> str:
    """Mean and half the width of its interval."""
    half = half_width(values)
    return f"{statistics.mean(values):{sign}.1f}" + (f" ± {half:.1f}" if half is not None else "")


def half_width(values: list[float]) -> float | None:
    """Of the interval of the mean; None for a single value."""
    if len(values) < 2:
        return None
    return STUDENT_95[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5


def differences(lines: list[dict], one: str, other: str, world: str = "noisy") -> list[float]:
    """Points by which `one` is above `other`, seed by seed, where both are there."""
    first, second = by_seed(lines, one, world), by_seed(lines, other, world)
    return [first[seed]["accuracy"] - second[seed]["accuracy"] for seed in sorted(first.keys() & second.keys())]


def with_prompts(lines: list[dict], one: str, other: str) -> float:
    """Half the width of the interval for new seeds and new prompts: both are drawn, and crossed.

    The variance of the mean is that over seeds plus that over prompts, less what both hold of single answers.
    """
    first, second = by_seed(lines, one), by_seed(lines, other)
    seeds = sorted(first.keys() & second.keys())
    rows = [[100 * (a - b) for a, b in zip(marks(first[s]), marks(second[s]), strict=True)] for s in seeds]
    of_seeds = statistics.variance(map(statistics.mean, rows)) / len(seeds)
    columns = list(map(statistics.mean, zip(*rows, strict=True)))
    of_prompts = statistics.variance(columns) / len(columns)
    single = statistics.mean(statistics.variance(column) for column in zip(*rows, strict=True))
    both = max(of_seeds, of_seeds + of_prompts - single / (len(seeds) * len(columns)))
    return STUDENT_95[len(seeds) - 1] * both**0.5


def bias_and_variance(lines: list[dict], name: str) -> tuple[float, float]:
    """Squared bias and variance of the error on a prompt over the seeds, which redraw all training data."""
    rows = [marks(line) for line in by_seed(lines, name).values()]
    shares, number = [sum(column) / len(rows) for column in zip(*rows, strict=True)], len(rows)
    variance = statistics.mean(p * (1 - p) for p in shares) * number / (number - 1)
    return 1 - statistics.mean(shares) - variance, variance


def main_table(lines: list[dict], world: str = "noisy") -> str:
    """Every method of one world."""
    rows = ["| method | right, % | careless, % | FuseRL minus it | seeds won | bias² | variance |"]
    rows.append("|---|---|---:|---|---:|---:|---:|")
    for name in ["target", *METHODS]:
        if not (of := by_seed(lines, name, world)):
            continue
        values = [line["accuracy"] for line in of.values()]
        row = [name, interval(values), f"{statistics.mean(line['careless'] for line in of.values()):.1f}"]
        gains = differences(lines, FUSERL, name, world)
        row += [interval(gains, "+"), f"{sum(g > 0 for g in gains)} of {len(gains)}"] if name != FUSERL else ["", ""]
        if world == "noisy":
            row += [f"{part:.3f}" for part in bias_and_variance(lines, name)] if len(of) > 1 else ["", ""]
        rows.append(f"| {' | '.join(row)} |")
    if world != "noisy":
        rows[:2] = ["| method | right, % | careless, % | FuseRL minus it | seeds won |", "|---|---|---:|---|---:|"]
    return "\n".join(rows)


def claims_table(lines: list[dict]) -> str:
    """Each claim as a difference, with what was found before."""
    rows = ["| method | minus | points | with new prompts, too | seeds won | earlier (seeds) | the interval is |"]
    rows.append("|---|---|---|---:|---:|---|---|")
    for one, other, earlier in CLAIMS:
        gains = differences(lines, one, other)
        if len(gains) < 2:
            continue
        mean, half, wide = statistics.mean(gains), half_width(gains), with_prompts(lines, one, other)
        verdict = "above 0" if mean - half > 0 else "below 0" if mean + half < 0 else "around 0"
        won = f"{sum(g > 0 for g in gains)} of {len(gains)}"
        rows.append(f"| {one} | {other} | {interval(gains, '+')} | ± {wide:.1f} | {won} | {earlier} | {verdict} |")
    return "\n".join(rows)


def seeds_table(lines: list[dict], world: str = "noisy") -> str:
    """Every seed's number."""
    seeds = sorted({line["seed"] for line in lines if line["world"] == world})
    rows = [f"| method | {' | '.join(map(str, seeds))} |", f"|---|{'---:|' * len(seeds)}"]
    for name in ["target", *METHODS]:
        if of := by_seed(lines, name, world):
            cells = [f"{of[seed]['accuracy']:.1f}" if seed in of else "" for seed in seeds]
            rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def search_table(tries: dict) -> str:
    """All tries, the best of each method in bold."""
    rows = ["| method | rates: right, % |", "|---|---|"]
    for name, method in METHODS.items():
        if method.tries:
            best = chosen(name, tries)
            cells = [("**{}: {:.1f}**" if r == best else "{}: {:.1f}").format(r, tries[name, r]) for r in method.tries]
            rows.append(f"| {name} | {'; '.join(cells).replace('optim.', '').replace('objective.', '')} |")
    return "\n".join(rows)


def phase_table(worlds: list[dict]) -> str:
    """The student's worlds, or its learned rewards: means, and FuseRL minus others."""
    shown = [key for key in ("right", "habit", "noise", "sources", "comparisons", "reward") if key in worlds[0]]
    heads = [*shown, "A", "tau", "SFT(best), FuseSFT, uniform", "FuseRL", "minus more", "minus best", "minus uniform"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line in worlds:
        stage_1 = ", ".join(f"{statistics.mean(line[n]):.1f}" for n in ("SFT(best)", "FuseSFT", "uniform SFT"))
        row = [*(line[key] for key in shown), f"{line['reward_accuracy']:.2f}", f"{line['tau']:.2f}", stage_1]
        row.append(f"{statistics.mean(line[FUSERL]):.1f}")
        for other in ("FuseSFT + more FuseSFT", "SFT(best) + DPO", "uniform SFT + uniform DPO"):
            row.append(interval([a - b for a, b in zip(line[FUSERL], line[other], strict=True)], "+"))
        rows.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(rows)


def helps_table(worlds: list[dict]) -> str:
    """With learned rewards: FuseRL with one change minus FuseRL as it is."""
    names = list(worlds[0])[list(worlds[0]).index(FUSERL) + 1 :]
    heads = " | ".join(f"{world['comparisons']}, {world['reward']}" for world in worlds)
    rows = [f"| FuseRL with | {heads} |"]
    rows.append("|---" * (len(worlds) + 1) + "|")
    for name in names:
        cells = [interval([a - b for a, b in zip(w[name], w[FUSERL], strict=True)], "+") for w in worlds]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def sweep_table(worlds: list[dict]) -> str:
    """FuseRL of the student by temperature, in multiples of the rule's."""
    multiples = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    rows = [f"| habit | noise | rule | 0 | {' | '.join(f'x {m:g}' for m in multiples)} | inf |"]
    rows.append(f"|---|---|---{'|---:' * (len(multiples) + 2)}|")
    for line in worlds:
        names = [FUSERL if m == 1 else f"{FUSERL}, rule x {m:g}" for m in multiples]
        if names[0] in line:
            means = [statistics.mean(line[n]) for n in ("SFT(best) + DPO", *names, "uniform SFT + uniform DPO")]
            cells = [f"**{mean:.1f}**" if mean == max(means) else f"{mean:.1f}" for mean in means]
            rows.append(f"| {line['habit']:g} | {line['noise']:g} | {line['tau']:.2f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> int:
    """Check, then print."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "results.jsonl"
    lines, tries = read(path), read_tries()
    if found := problems(lines, tries):
        print("\n".join(f"table: {path}: {problem}" for problem in found), file=sys.stderr)
        return 1
    for world in dict.fromkeys(line["world"] for line in lines):
        print(f"\n### {world}\n\n{main_table(lines, world)}\n\n{seeds_table(lines, world)}")
        if world == "noisy":
            print(f"\n{claims_table(lines)}")
    worlds, learned = read(path.with_name("phase.jsonl")), read(path.with_name("learned.jsonl"))
    print(f"\n### student\n\n{phase_table(worlds)}\n\n{sweep_table(worlds)}")
    print(f"\n### learned rewards\n\n{phase_table(learned)}\n\n{helps_table(learned)}")
    print(f"\n### tries\n\n{search_table(tries)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
