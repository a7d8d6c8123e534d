"""What `fuserl build` says at the end: a table where a person watches, plain lines in a log."""

import sys
from pathlib import Path

from fuserl_megatron.data.dataset import Manifest
from fuserl_megatron.records.temperature import rule_line
from fuserl_megatron.util.text import printable

SOURCE_COLUMNS = ("source", "prompts", "responses", "mean reward", "mean weight", "win rate")


def print_summary(manifest: Manifest) -> None:
    """Print sources, weights, token counts and everything dropped."""
    rows = []
    for name, s in manifest.per_source.items():
        numbers = f"{s['mean_reward']:.4f}", f"{s['mean_weight']:.4f}", f"{s['win_rate']:.1%}"
        rows.append((printable(name), f"{s['prompts']:,}", f"{s['responses']:,}", *numbers))
    head, *tail = map(printable, summary_lines(manifest))
    print(head)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*SOURCE_COLUMNS)
        for row in rows:
            table.add_row(*map(Text, row))  # not text with markup: a source may be called [/x]
        Console().print(table)
    else:
        for row in rows:
            print(", ".join(f"{name} {value}" for name, value in zip(SOURCE_COLUMNS, row, strict=True)))
    print(*tail, sep="\n")


def summary_lines(manifest: Manifest) -> list[str]:
    """Everything but the table of sources: a headline, then one subject a line."""
    m, t, e = manifest, manifest.tokens, manifest.effective_number_of_sources
    lines = [
        f"{m.num_prompts:,} prompts, {m.num_responses:,} responses, {len(m.sources)} sources, data set {m.hash[:12]}",
        f"effective number of sources at reward_temperature {m.reward_temperature:g} (scores: {m.score_aggregation}, "
        f"standardisation: {m.reward_standardization}): mean {e['mean']:.2f} of {len(m.sources)}, "
        f"p05 {e['p05']:.2f}, median {e['p50']:.2f}, p95 {e['p95']:.2f}",
        f"tokens: prompt mean {t['prompt_mean']:.0f} max {t['prompt_max']:,}, response mean {t['response_mean']:.0f} "
        f"max {t['response_max']:,}, prompt + response max {t['total_max']:,} (max_length {m.max_length:,})",
        f"end of turn: {m.end_of_turn}",
    ]
    others = [f"{Path(i['name']).name} as {i['format']}" for i in m.inputs if i.get("format") not in (None, "records")]
    if others:
        lines.append(f"read: {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}")
    if m.temperature_rule:
        lines.insert(1, rule_line(m.reward_temperature, m.temperature_rule))
    counted = ", ".join(f"{name} {n:,}" for name, n in m.counts.items() if n and name != "records")
    lines.append(f"of {m.counts['records']:,} records: {counted or 'nothing dropped, cut or unusual'}")
    if m.counts.get("prompts_with_the_date"):
        lines.append("the chat template prints the date of this build into prompts: another day gives another data set")
    if m.rejected:
        reasons = ", ".join(f"{name} {n:,}" for name, n in m.rejected.items())
        lines.append(f"rejected, listed in rejected.jsonl: {reasons}")
    if m.unknown_keys:
        keys = ", ".join(f"{name} ({n:,})" for name, n in m.unknown_keys.items())
        lines.append(f"fields that were ignored: {keys}")
    return lines
