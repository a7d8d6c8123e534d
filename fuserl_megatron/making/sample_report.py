"""What a source answered, in figures: for done.json, the table at the end, and report.html."""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fuserl_megatron.config.keys import leaves
from fuserl_megatron.config.score_sections import REFUSALS
from fuserl_megatron.util.report_page import columns, histogram, write_page
from fuserl_megatron.util.text import show

CUT_WARNING, REPEATED_WARNING = 0.05, 0.1
"""A larger share of answers that are cut by the limit of tokens, or repeat another one, is pointed out."""
ENOUGH_TWINS = 20
BARS = 24


def figures_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one source's rows, which come prompt by prompt."""
    counts: Counter[str] = Counter()
    tokens, prompt_tokens, seconds = array("q"), array("q"), array("d")
    prompt: str | None = None
    texts: set[int] = set()
    for row in rows:
        text = row["response"]
        counts["answers"] += 1
        counts["empty"] += not text.strip()
        counts["cut"] += row["finish_reason"] == "length"
        counts["refused"] += text.lstrip()[:40].lower().replace("\u2019", "'").startswith(REFUSALS)
        counts["with_reasoning"] += "reasoning" in row
        counts["tried_again"] += row["attempt"] > 1
        if row["prompt_id"] != prompt:
            counts["prompts"] += 1
            counts["distinct"] += len(texts)
            prompt, texts = row["prompt_id"], set()
        texts.add(hash(text))
        tokens.append(row["tokens"] or 0)
        prompt_tokens.append(row["prompt_tokens"] or 0)
        seconds.append(row["seconds"])
    counts["distinct"] += len(texts)
    names = ("prompts", "answers", "distinct", "cut", "empty", "refused", "with_reasoning", "tried_again")
    figures: dict[str, Any] = {name: counts[name] for name in names}
    if tokens:
        measured = np.frombuffer(tokens, np.int64)
        figures |= {
            "tokens": int(measured.sum()),
            "prompt_tokens": int(sum(prompt_tokens)),
            "tokens_mean": round(float(measured.mean()), 1),
            "tokens_p95": int(np.percentile(measured, 95)),
            "tokens_most": int(measured.max()),
            "seconds_mean": round(float(np.mean(seconds)), 2),
            "histogram": np.histogram(measured, BARS, (0, max(int(measured.max()), 1)))[0].tolist(),
        }
    return figures


class Twins:
    """Are all answers to a prompt the same? Then a server takes the likeliest token each time, whatever it is asked."""

    def __init__(self) -> None:
        self._first: dict[int, int] = {}
        self._pairs = 0

    def seen(self, prompt: int, text: str) -> bool:
        """Note an answer; True once, when so many second answers were the first one again and none was another."""
        if self._pairs >= ENOUGH_TWINS:
            return False
        if prompt not in self._first:
            self._first[prompt] = hash(text)
            return False
        self._pairs = self._pairs + 1 if self._first.pop(prompt) == hash(text) else ENOUGH_TWINS + 1
        return self._pairs == ENOUGH_TWINS


def cells(sources: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A head, and a row for each source."""
    rows: list[tuple[str, ...]] = [
        ("source", "answers", "distinct", "cut", "empty", "refused", "failed", "tokens", "mean", "p95", "tokens/s")
    ]
    for name, done in sources.items():
        figures = done["figures"]
        shares = (share(figures[kind], figures["answers"]) for kind in ("distinct", "cut", "empty", "refused"))
        pace = f"{done['tokens_per_second']:,.0f}" if done.get("tokens_per_second") else "-"
        lengths = (f"{figures.get('tokens_mean', 0):g}", f"{figures.get('tokens_p95', 0):,}")
        counts = (f"{done['failed']:,}", f"{figures.get('tokens', 0):,}")
        rows.append((name, f"{figures['answers']:,}", *shares, *counts, *lengths, pace))
    return rows


def table(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines to print: the cells in columns, and what a person should look at."""
    return [*columns(cells(sources)), *warnings(sources)]


def warnings(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a person should look at before training on it."""
    lines = []
    for name, done in sources.items():
        figures = done["figures"]
        answers = max(figures["answers"], 1)
        if figures["cut"] / answers > CUT_WARNING:
            what = f"{share(figures['cut'], answers)} of the answers are cut by sampling.max_tokens"
            lines.append(f"WARNING: {name}: {what}: raise it, or leave cut answers out when scoring")
        if (answers - figures["distinct"]) / answers > REPEATED_WARNING:
            what = f"{share(answers - figures['distinct'], answers)} of the answers repeat another one to their prompt"
            lines.append(f"WARNING: {name}: {what}: scoring leaves them out (policy.duplicated); a larger n asks on")
        if figures["empty"]:
            lines.append(f"WARNING: {name}: {figures['empty']:,} answers are empty; `fuserl build` takes none of them")
        if done["failed"]:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in done["failures"].items())
            again = "retry_failed=true asks for them again"
            lines.append(f"WARNING: {name}: {done['failed']:,} answers failed ({kinds}): failures.jsonl; {again}")
    return lines


def write_html(file: Path, sources: Mapping[str, Mapping[str, Any]]) -> None:
    """One page without anything from elsewhere: the table, the lengths of the answers, the faults."""
    head, *rows = cells(sources)
    pictures: dict[str, str] = {}
    runs: list[tuple[str, ...]] = []
    for name, done in sources.items():
        figures = done["figures"]
        if heights := figures.get("histogram"):
            edges = np.linspace(0, figures["tokens_most"], len(heights) + 1).tolist()
            pictures[f"{name}: answers by length in tokens"] = histogram(heights, edges)
        kept = {key: value for key, value in done.items() if key not in ("parts", "figures")}
        runs += [(name, key, show(value)) for key, value in leaves(kept)]
    tables = {"Sources": (head, rows), "Runs": (("source", "", ""), runs)}
    write_page(file, "Sampling", warnings(sources), tables, pictures)


def share(part: int, whole: int) -> str:
    """As a percentage."""
    return f"{100 * part / max(whole, 1):.1f}%"
