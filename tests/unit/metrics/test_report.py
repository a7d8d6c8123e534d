"""report.html: what it shows of a run's files, and that it asks nobody for anything."""

import json
import re

import pytest

from fuserl_megatron.cli import main
from fuserl_megatron.metrics.report import CHARTS, page
from fuserl_megatron.metrics.run_files import Run
from fuserl_megatron.util.line_chart import line_chart, thinned, ticks


@pytest.fixture
def run(tmp_path):
    def make(name, steps=3, **settings):
        root = tmp_path / name
        root.mkdir()
        rows = [
            {"step": i, "loss": 1 / i, "lr": 1e-3, "accuracy/a<b": 0.5, "seconds": 2.0, "real_tokens": 10}
            for i in range(1, steps + 1)
        ]
        # step 2 was done again after a resume, and the last line is torn
        lines = [json.dumps(row) for row in (rows[0], {"step": 2, "loss": 9.0}, *rows[1:])]
        (root / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9']))
        (root / "validation.jsonl").write_text(json.dumps({"step": 0, "val_loss": 2.5}) + "\n")
        lines = [f"{key}: {value}" for key, value in settings.items()]
        (root / "config.yaml").write_text("\n".join(["model: {path: models/<x>}", *lines]))
        return root

    return make


def test_a_run_that_was_resumed(run):
    found = Run.read(run("one"))
    assert [step["loss"] for step in found.steps] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert found.settings == {"model.path": "models/<x>"}


def test_the_page_has_the_curves_and_asks_for_nothing(run, capsys):
    root = run("one")
    assert main(["report", str(root)]) == 0
    assert capsys.readouterr().out == f"written: {root / 'report.html'}\n"
    text = (root / "report.html").read_text()
    assert re.findall(r"<h3>(.*?)</h3>", text) == ["Loss", "Accuracy by source", "Learning rate", "Time of a step"]
    assert "http" not in text and "<script" not in text and "models/&lt;x&gt;" in text and "a&lt;b 0.5" in text
    assert "train 0.3333" in text and "validation 2.5" in text


def test_several_runs_show_what_differs(run, tmp_path):
    roots = [run("one", seed=1), run("two", seed=2)]
    assert main(["report", *map(str, roots), "--output", str(tmp_path / "both.html")]) == 0
    text = (tmp_path / "both.html").read_text()
    assert "<td>seed</td><td>1</td><td>2</td>" in text and "one train" in text and "two validation" in text


def test_before_and_after(run):
    root = run("one")
    found = {"fusesft": {"loss": 1.0}, "before": {"fusesft": {"loss": 1.5}}}
    (root / "evaluation.json").write_text(json.dumps(found))
    assert "<td>fusesft loss</td><td>1.5</td><td>1</td><td>-0.5</td>" in page({"one": Run.read(root)})


def test_no_run_and_no_sense(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no metrics.jsonl and no evaluation.json" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--watch", "0"]) == 2


def test_many_steps_become_few_points():
    points = [(i, float(i % 10)) for i in range(10_000)]
    found = thinned(points)
    assert len(found) == 400 and found[-1][0] == 9999 and all(abs(y - 4.5) < 1 for _, y in found)
    assert thinned(points[:400]) == points[:400]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3, 3), (-0.02, 0.031), (1e-9, 5e-5), (0, 0), (1, 10_000)])
def test_ticks_hold_the_range_and_are_few(low, high):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8


def test_charts_without_numbers_and_with_one():
    assert line_chart({"a": [(1, float("nan"))]}, "x") == "<p>No values.</p>"
    assert "<circle" in line_chart({"a": [(1, 2.0)]}, "x")
    assert "stroke-dasharray" in line_chart({"validation": [(1, 2.0), (2, 3.0)]}, "x")


def test_every_chart_says_what_it_is():
    assert all(chart.says.endswith(".") and chart.unit for chart in CHARTS)
