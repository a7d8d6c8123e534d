"""What `fuserl score` says of a finished run: a dictionary (report.json), tables for a terminal, a page (report.html).

N answers, P prompts, K sources.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fuserl_megatron.making.answers import CUT, DUPLICATE, EMPTY, HELDOUT, REFUSED, AnswerTable, count_flags
from fuserl_megatron.making.join import Values, group_moments
from fuserl_megatron.util.report_page import bars, columns, histogram, write_page
from fuserl_megatron.util.text import printable

MANY_CUT = 0.05
"""Share of cut answers above which the headline warns."""
BINS = 24


def describe(
    prepared: Any, values: Values, total: np.ndarray, dropped: Mapping[str, int], plans: Mapping[str, Any]
) -> dict[str, Any]:
    """All figures. `total` [N] is the combined reward, NaN for answers that were left out."""
    table, kept = prepared.table, ~np.isnan(total)
    columns = dict(values.rewards) | ({"combined": total} if len(values.rewards) > 1 or _changed(values, total) else {})
    return {
        "answers": len(table.keys),
        "prompts": table.num_prompts,
        "prompts_with_records": len(np.unique(table.prompt_ids[kept])),
        "records": int(kept.sum()),
        "repeated_records": len(table.repeated),
        "flags": dict(count_flags(table)),
        "prompts_heldout": len(np.unique(table.prompt_ids[table.has(HELDOUT)])),
        "left_out": {name: number for name, number in dropped.items() if number},
        "sources": {name: _source(table, k, total, columns) for k, name in enumerate(table.sources)},
        "rewards": {name: _reward(name, column, table, kept, values, plans) for name, column in columns.items()},
        "correlations": _correlations(columns, table, kept),
        "logprobs": {name: int((kept & ~np.isnan(column)).sum()) for name, column in values.logps.items()},
    }


def _changed(values: Values, total: np.ndarray) -> bool:
    """Whether one reward alone was weighted or otherwise changed on its way to the record."""
    return not all(
        np.array_equal(column[~np.isnan(total)], total[~np.isnan(total)]) for column in values.rewards.values()
    )


def _source(table: AnswerTable, k: int, total: np.ndarray, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    own = table.source_ids == k
    answers, kept = int(own.sum()), own & ~np.isnan(total)
    shares = {
        name: float((table.has(flag) & own).sum() / answers) for name, flag in (("cut", CUT), ("refused", REFUSED))
    }
    return {
        "answers": answers,
        "records": int(kept.sum()),
        "distinct": int((own & ~table.has(DUPLICATE)).sum()),
        "empty": int((own & table.has(EMPTY)).sum()),
        **shares,
        "words": float(table.words[own].mean()),
        "win_rate": _win_rates(table, total)[k],
        "rewards": {name: _moments(column[kept]) for name, column in columns.items()},
    }


def _moments(numbers: np.ndarray) -> dict[str, float | None]:
    numbers = numbers[~np.isnan(numbers)]
    if not numbers.size:
        return {"mean": None, "deviation": None}
    return {"mean": float(numbers.mean()), "deviation": float(numbers.std())}


def _best(table: AnswerTable, column: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """[P, K] best value of a source for a prompt; NaN without one. Prompts and sources of the table."""
    best = np.full((table.num_prompts, len(table.sources)), -np.inf)
    kept = kept & ~np.isnan(column)
    np.maximum.at(best, (table.prompt_ids[kept], table.source_ids[kept]), column[kept])
    return np.where(np.isfinite(best), best, np.nan)


def _win_rates(table: AnswerTable, total: np.ndarray) -> list[float | None]:
    """[K] share of the prompts that several sources answered in which the source has the best answer; ties shared."""
    best = _best(table, total, ~np.isnan(total))
    best = best[(~np.isnan(best)).sum(axis=1) > 1]
    if not len(best):
        return [None] * len(table.sources)
    wins = best == np.nanmax(best, axis=1, keepdims=True)
    return [float(share) for share in (wins / wins.sum(axis=1, keepdims=True)).mean(axis=0)]


def _reward(
    name: str, column: np.ndarray, table: AnswerTable, kept: np.ndarray, values: Values, plans: Mapping[str, Any]
) -> dict[str, Any]:
    has = kept & ~np.isnan(column)
    numbers = column[has]
    counts = np.bincount(table.prompt_ids[has], minlength=table.num_prompts)
    _, deviations = group_moments(column, has, table.prompt_ids)
    best = _best(table, column, has)
    several = (~np.isnan(best)).sum(axis=1) > 1
    heights, edges = np.histogram(numbers, BINS) if numbers.size else (np.zeros(1, int), np.zeros(2))
    about = {
        **_moments(numbers),
        "quantiles": {f"p{q:02d}": float(np.quantile(numbers, q / 100)) for q in (1, 25, 50, 75, 99)}
        if numbers.size
        else {},
        "spread_answers": float(deviations[: table.num_prompts][counts > 1].mean()) if (counts > 1).any() else None,
        "spread_sources": float(np.nanstd(best[several], axis=1).mean()) if several.any() else None,
        "prompts_all_equal": float((deviations[: table.num_prompts][counts > 1] < 1e-9).mean())
        if (counts > 1).any()
        else None,
        "histogram": {"heights": heights.tolist(), "edges": [float(edge) for edge in edges]},
    }
    if name in plans:
        about |= {"errors": dict(values.errors[name]), "lineage": plans[name]}
    return about


def _correlations(columns: Mapping[str, np.ndarray], table: AnswerTable, kept: np.ndarray) -> dict[str, dict[str, Any]]:
    """Pearson correlation of each pair, of all answers and within prompts (their means taken away)."""
    everything = dict(columns) | {"length": table.words.astype(float)}
    found: dict[str, dict[str, Any]] = {}
    names = list(everything)
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            both = kept & ~np.isnan(everything[one]) & ~np.isnan(everything[two])
            within = []
            for name in (one, two):
                mean, _ = group_moments(everything[name], both, table.prompt_ids)
                within.append((everything[name] - mean[table.prompt_ids])[both])
            overall = _pearson(everything[one][both], everything[two][both])
            found[f"{one} ~ {two}"] = {"overall": overall, "within_prompts": _pearson(*within)}
    return found


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    if a.size < 3 or a.std() < 1e-12 or b.std() < 1e-12:
        return None
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))


def headlines(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know first, one line each."""
    r, total = report, report["answers"]
    cut, prompts = r["flags"]["cut"] / total, r["prompts"]
    lines = [f"{r['records']:,} records of {total:,} answers to {prompts:,} prompts, {len(r['sources'])} sources"]
    worst, share = max(((name, s["cut"]) for name, s in r["sources"].items()), key=lambda entry: entry[1])
    lines.append(f"cut by the token limit: {cut:.1%} of all answers; most by {worst}: {share:.1%}")
    if share > MANY_CUT:
        lines.append(f"WARNING: {share:.0%} of {worst}'s answers have no end: sample them again with more max_tokens")
    left = ", ".join(f"{name} {number:,}" for name, number in r["left_out"].items())
    lines.append(f"left out: {left or 'nothing'}")
    for name, count in r["logprobs"].items():
        lines.append(f"log-probabilities of {name}: of {count:,} records")
    if r["repeated_records"]:
        lines.append(f"records that stand twice in the input, read once: {r['repeated_records']:,}")
    if r["prompts_heldout"]:
        lines.append(
            f"WARNING: {r['prompts_heldout']:,} prompts overlap with held-out ones (heldout_action=drop drops them)"
        )
    if r["prompts_with_records"] < prompts:
        lines.append(f"prompts without any record: {prompts - r['prompts_with_records']:,}")
    for name, reward in r["rewards"].items():
        if reward.get("errors"):
            kinds = ", ".join(f"{kind} {number:,}" for kind, number in reward["errors"].items())
            lines.append(f"reward {name}: answers without a value: {kinds}")
        equal = reward["prompts_all_equal"]
        if equal is not None and equal > 0.5:
            lines.append(
                f"reward {name}: all answers have the same value in {equal:.0%} of the prompts: it tells little"
            )
    return lines


def tables(report: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Title -> (columns, rows), as text."""
    names = list(report["rewards"])
    head = ["source", "answers", "distinct", "cut", "empty", "refused", "words", "records", "win rate", *names]
    rows = [
        [
            *(
                name,
                f"{s['answers']:,}",
                f"{s['distinct']:,}",
                f"{s['cut']:.1%}",
                f"{s['empty']:,}",
                f"{s['refused']:.1%}",
            ),
            *(f"{s['words']:.0f}", f"{s['records']:,}", _percent(s["win_rate"])),
            *(_number(s["rewards"][reward]["mean"]) for reward in names),
        ]
        for name, s in report["sources"].items()
    ]
    found = {"Sources (mean rewards)": (head, rows)}
    head = ["reward", "mean", "deviation", "p01", "p50", "p99", "spread of sources", "spread of answers"]
    rows = [
        [
            *(
                name,
                _number(r["mean"]),
                _number(r["deviation"]),
                *(_number(r["quantiles"].get(q)) for q in ("p01", "p50", "p99")),
            ),
            *(_number(r["spread_sources"]), _number(r["spread_answers"])),
        ]
        for name, r in report["rewards"].items()
    ]
    found["Rewards (spread: deviation within a prompt, what reward_temperature is compared with)"] = (head, rows)
    rows = [[pair, _number(c["overall"]), _number(c["within_prompts"])] for pair, c in report["correlations"].items()]
    found["Correlations"] = (["pair", "all answers", "within prompts"], rows)
    return found


def print_table(report: Mapping[str, Any], file: TextIO) -> None:
    """Headlines, then the tables."""
    print(*map(printable, headlines(report)), sep="\n", file=file)
    for title, (head, rows) in tables(report).items():
        print(f"\n{title}", *columns([head, *([*map(printable, row)] for row in rows)]), sep="\n", file=file)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def write_html(file: Path, report: Mapping[str, Any]) -> None:
    """The same as a page with pictures."""
    pictures = {"Cut by the token limit": bars({name: s["cut"] for name, s in report["sources"].items()})}
    if len(report["sources"]) > 1:
        pictures["Win rate"] = bars({name: s["win_rate"] for name, s in report["sources"].items()})
    for name, reward in report["rewards"].items():
        pictures[f"Reward {name}"] = histogram(**reward["histogram"])
    write_page(file, "Scored responses", headlines(report), tables(report), pictures)
