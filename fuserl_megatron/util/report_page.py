"""How reports look: columns of text on a terminal, and report.html, one file without a script, with SVG inside it."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fuserl_megatron.util.files import write_file
from fuserl_megatron.util.text import printable

STYLE = """body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0 1.5em}
td,th{border-bottom:1px solid #ddd;padding:.2em .7em;text-align:right}
td:first-child,th:first-child{text-align:left}svg{margin:.5em 1em .5em 0}.warning{color:#a00;font-weight:bold}"""
WIDTH, HEIGHT = 360, 150


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def write_page(
    file: Path,
    title: str,
    lines: Sequence[str],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
    pictures: Mapping[str, str],
) -> None:
    """Write headlines, pictures (SVG by title) and tables (columns and rows of text by title)."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{_text(title)}</title><style>{STYLE}</style>"]
    parts.append(f"<h1>{_text(title)}</h1>")
    for line in lines:
        kind = " class=warning" if line.startswith("WARNING") else ""
        parts.append(f"<p{kind}>{_text(line)}</p>")
    parts.extend(f"<h2>{_text(name)}</h2>{picture}" for name, picture in pictures.items())
    for name, (head, rows) in tables.items():
        parts.append(f"<h2>{_text(name)}</h2>{table(head, rows)}")
    write_file(file, ["\n".join([*parts, "</html>\n"]).encode()])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns and rows of text as HTML."""
    cells = "".join(f"<th>{_text(column)}</th>" for column in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def histogram(heights: Sequence[int], edges: Sequence[float]) -> str:
    """Bars with the range below."""
    tallest, step = max([1, *heights]), WIDTH / max(1, len(heights))
    bars = [_bar(i * step, step - 1, HEIGHT * h / tallest, f"{edges[i]:.4g}: {h:,}") for i, h in enumerate(heights)]
    return _svg(bars, [(0, "start", f"{edges[0]:.4g}"), (WIDTH, "end", f"{edges[-1]:.4g}")])


def bars(values: Mapping[str, float | None]) -> str:
    """One bar a name, from 0 to 1."""
    step = WIDTH / max(1, len(values))
    drawn = [
        _bar(i * step + 4, step - 8, HEIGHT * (v or 0), f"{n}: {v or 0:.1%}") for i, (n, v) in enumerate(values.items())
    ]
    names = [(i * step + step / 2, "middle", name[: max(3, int(step / 8))]) for i, name in enumerate(values)]
    return _svg(drawn, names)


def _bar(x: float, width: float, height: float, title: str) -> str:
    box = f'x="{x:.1f}" y="{HEIGHT - height:.1f}" width="{max(width, 1):.1f}" height="{height:.1f}"'
    return f'<rect {box} fill="#47a"><title>{_text(title)}</title></rect>'


def _svg(shapes: Sequence[str], labels: Sequence[tuple[float, str, str]]) -> str:
    line = f'<line x1="0" y1="{HEIGHT}" x2="{WIDTH}" y2="{HEIGHT}" stroke="#999"/>'
    texts = [
        f'<text x="{x:.1f}" y="{HEIGHT + 16}" font-size="12" text-anchor="{anchor}">{_text(text)}</text>'
        for x, anchor, text in labels
    ]
    return f'<svg width="{WIDTH}" height="{HEIGHT + 24}" role="img">{"".join([*shapes, line, *texts])}</svg>'


def _text(text: Any) -> str:
    return escape(printable(str(text)))
