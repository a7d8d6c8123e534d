"""What a run says and writes: a log with lines that are no records, and names that look like markup on a terminal."""

import io
import sys

from fuserl_megatron.config.schema import Config
from fuserl_megatron.metrics.run_log import RunLog, cut_back
from fuserl_megatron.records import summary


def test_lines_that_are_no_records_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    nested = "[" * 100_000
    file.write_text('{"step": 1}\n3\nnull\n{"a": 1}\n{"step": "x"}\n' + nested + '\n{"step": 2}\n{"step": 3}\n{"st')
    cut_back(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


class Terminal(io.TextIOWrapper):
    """A terminal that can print ASCII alone, as some batch systems have it."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii", errors="backslashreplace")

    def isatty(self):
        return True


def test_a_name_is_no_markup_and_no_format(tmp_path, monkeypatch):
    for name in ("run [/x]", "lr={x}", "%s", "\u00e9\u6a21"):
        monkeypatch.setattr(sys, "stdout", Terminal())
        config = Config()
        config = type(config)(run=type(config.run)(name=name))
        log = RunLog(config, tmp_path / "run", total=2, first_step=0, active=True)
        log.close()


def test_the_table_of_sources_takes_any_name(monkeypatch):
    numbers = {"mean_reward": 1.0, "mean_weight": 1.0, "win_rate": 1.0, "prompts": 1, "responses": 1}

    class Stub:
        per_source = {"[/x]": numbers, "\u6a21\x1b[31m": numbers}

    monkeypatch.setattr(summary, "summary_lines", lambda manifest: ["head", "tail"])
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    summary.print_summary(Stub())
    terminal.flush()
    said = terminal.buffer.getvalue().decode()
    assert "[/x]" in said and "\\u6a21\\x1b[31m" in said.replace(" ", "")
