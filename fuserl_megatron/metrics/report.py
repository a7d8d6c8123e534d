"""report.html of one or several runs: one page without scripts or requests to anywhere, readable in light and dark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fuserl_megatron.metrics.run_files import Run
from fuserl_megatron.util.files import write_file
from fuserl_megatron.util.line_chart import line_chart
from fuserl_megatron.util.report_page import table

FILE = "report.html"


@dataclass(frozen=True)
class Chart:
    """One picture: lines named `train` over the steps, and `val_` of them where a run validated."""

    title: str
    names: tuple[str, ...]
    """Metrics; one that ends with / stands for that metric of every source."""
    unit: str
    says: str


CHARTS = (
    Chart("Loss", ("loss",), "loss per prompt", "What is minimised, the mean over the prompts of a step."),
    Chart("NLL per token", ("nll_per_token",), "nats", "Of the scored tokens; lower is better."),
    Chart("NLL per token by source", ("nll_per_token/",), "nats", "A source that stays high is hard to imitate."),
    Chart("Preference accuracy", ("accuracy",), "share of pairs", "How often chosen beats rejected; 0.5 is chance."),
    Chart("Accuracy by source", ("accuracy/",), "share of pairs", "Inside each source."),
    Chart("Margin", ("margin",), "implicit reward", "Chosen minus rejected implicit reward."),
    Chart(
        "Implicit rewards",
        ("chosen_implicit_reward", "rejected_implicit_reward"),
        "implicit reward",
        "Both falling means that even chosen answers become less likely; an SFT term (rpo_alpha) holds them.",
    ),
    Chart("Distance to the reference", ("kl_to_reference",), "nats", "Mean log-ratio over the stored responses."),
    Chart("Gradient norm", ("grad_norm",), "norm", "Before clipping."),
    Chart("Learning rate", ("lr",), "rate", "As scheduled."),
    Chart("Weight by source", ("weight_share/",), "share", "Each source's part of all weight in a step."),
    Chart("Sources in effect", ("effective_number_of_sources",), "sources", "exp of the weights' entropy."),
    Chart("Throughput", ("tokens_per_second",), "tokens/s", "Real tokens of all ranks, padding left out."),
    Chart(
        "Time of a step",
        ("seconds", "seconds_data", "seconds_forward_backward", "seconds_gradient_sync", "seconds_optimizer"),
        "s",
        "Where the time goes.",
    ),
    Chart("Padding", ("padding_share",), "share of positions", "Positions of the rows that hold no token."),
    Chart("Memory", ("memory_gb",), "GB", "Peak of a rank."),
)
STYLE = """:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:76em;margin:1.5em auto;padding:0 1em}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28em),1fr));gap:1em 2em}
h3{margin:.6em 0 0}p{margin:.2em 0}.wide,pre{overflow-x:auto}
figure{margin:0}figcaption{font-size:13px}figcaption span{margin-right:1em;white-space:nowrap}
figcaption i{display:inline-block;width:1em;height:.3em;margin-right:.3em;vertical-align:middle}
svg.chart{width:100%;height:auto}svg text{font-size:12px;fill:currentColor}
svg .grid{stroke:currentColor;opacity:.15}svg polyline{stroke-width:1.8}
table{border-collapse:collapse}td,th{padding:.15em .8em;border-bottom:1px solid #8884;text-align:right}
td:first-child,th:first-child{text-align:left}"""


def write_report(directories: Sequence[str | Path], file: str | Path, refresh: float | None = None) -> list[Run]:
    """Write the page about these runs; with `refresh` a browser reads it again every so many seconds.

    Raises:
        UserError: one of them is not the directory of a run.
    """
    runs = [Run.read(directory) for directory in directories]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # runs/a/sft and runs/b/sft
        names = [str(directory) for directory in directories]
    write_file(Path(file), [page(dict(zip(names, runs, strict=True)), refresh).encode()])
    return runs


def page(runs: Mapping[str, Run], refresh: float | None = None) -> str:
    """The page, as text."""
    title = ", ".join(runs)
    again = f'<meta http-equiv=refresh content="{refresh:g}">' if refresh else ""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8>{again}<title>{escape(title)}</title>"
        f'<meta name=viewport content="width=device-width,initial-scale=1"><style>{STYLE}</style>'
        f"<h1>{escape(title)}</h1>",
        _table(["run", "steps", "loss", "validation loss", "tokens/s", "hours", "model", "data"], _overview(runs)),
    ]
    for name, run in runs.items():
        if run.evaluation:
            parts += [f"<h2>{escape(name)}: held-out prompts</h2>", _evaluation(run.evaluation)]
    parts.append("<h2>Over the steps</h2><div class=charts>")
    for chart in CHARTS:
        series = _series(chart, runs)
        if series:
            parts.append(
                f"<section><h3>{chart.title}</h3><p>{chart.says}</p>{line_chart(series, chart.unit)}</section>"
            )
    parts.append("</div>")
    for name, run in runs.items():
        if run.data.get("per_source"):
            parts += [f"<h2>{escape(name)}: data</h2>", _data(run.data)]
    if len(runs) > 1:
        parts += ["<h2>Settings that differ</h2>", _differences(runs)]
    for name, run in runs.items():
        text = "\n".join(f"{key}: {value}" for key, value in run.settings.items())
        parts.append(f"<details><summary>All settings of {escape(name)}</summary><pre>{escape(text)}</pre></details>")
    return "\n".join([*parts, "</html>\n"])


def _overview(runs: Mapping[str, Run]) -> list[list[str]]:
    rows = []
    for name, run in runs.items():
        last = run.steps[-1] if run.steps else {}
        seconds = sum(step.get("seconds", 0.0) for step in run.steps)
        tokens = sum(step.get("real_tokens", 0) for step in run.steps)
        validation = run.validations[-1].get("val_loss") if run.validations else None
        rows.append(
            [name, str(last.get("step", "")), _number(last.get("loss")), _number(validation)]
            + [f"{tokens / seconds:,.0f}" if seconds else "", f"{seconds / 3600:.2f}"]
            + [str(run.settings.get(key, "")) for key in ("model.path", "data.path")]
        )
    return rows


def _series(chart: Chart, runs: Mapping[str, Run]) -> dict[str, list[tuple[float, float]]]:
    series = {}
    for run_name, run in runs.items():
        for kind, prefix, records in (("train", "", run.steps), ("validation", "val_", run.validations)):
            seen = dict.fromkeys(key for record in records for key in record)
            for wanted in chart.names:
                whole = prefix + wanted
                for key in [k for k in seen if k == whole or (wanted.endswith("/") and k.startswith(whole))]:
                    several = len(chart.names) > 1 or wanted.endswith("/")
                    label = key.removeprefix(whole if wanted.endswith("/") else prefix) if several else ""
                    words = [run_name if len(runs) > 1 else "", label, kind if prefix or not label else ""]
                    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
                    series[" ".join(word for word in words if word)] = points
    return {name: points for name, points in series.items() if points}


def _evaluation(found: dict[str, Any]) -> str:
    before, rows = found.get("before", {}), []
    for stage in ("fusesft", "fusepo"):
        for key, value in (found.get(stage) or {}).items():
            old = (before.get(stage) or {}).get(key)
            change = value - old if isinstance(old, int | float) and isinstance(value, int | float) else None
            rows.append([f"{stage} {key}", _number(old), _number(value), _number(change)])
    return _table(["", "before", "after", "change"], rows)


def _data(data: dict[str, Any]) -> str:
    rows = [
        [name, f"{s['prompts']:,.0f}", f"{s['responses']:,.0f}"]
        + [_number(s.get(key)) for key in ("mean_reward", "mean_weight", "win_rate")]
        for name, s in data["per_source"].items()
    ]
    line = f"{data['num_prompts']:,} prompts, {data['num_responses']:,} responses, reward_temperature "
    return f"<p>{line}{data['reward_temperature']}</p>" + _table(
        ["source", "prompts", "responses", "mean reward", "mean weight", "win rate"], rows
    )


def _differences(runs: Mapping[str, Run]) -> str:
    keys = dict.fromkeys(key for run in runs.values() for key in run.settings)
    rows = []
    for key in keys:
        values = [str(run.settings.get(key, "")) for run in runs.values()]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return _table(["setting", *runs], rows) if rows else "<p>None.</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<div class=wide>{table(head, rows)}</div>"


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, int | float) else ""
