"""A few seconds of every fuzzer; `make fuzz` runs them for longer. What is counted: no traceback, no hang, nothing
damaged accepted."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import checkpoints
import commands
import models
import records
from common import Report, TimeUp, attempt

from fuserl_megatron.convert import megatron_checkpoint
from fuserl_megatron.util.errors import UserError

FUZZERS = {models: 1000, checkpoints: 250, commands: 150, records: 100}
"""And how many cases make test tries: always the same ones, whatever the machine is doing."""


@pytest.mark.parametrize("fuzzer", FUZZERS, ids=lambda module: module.__name__)
@pytest.mark.parametrize("seconds", [None, pytest.param(120, marks=pytest.mark.slow)])
def test_fuzz(fuzzer, seconds, capfd):
    report = fuzzer.run(1, seconds or 1200, None if seconds else FUZZERS[fuzzer])
    capfd.readouterr()
    assert not report.failures, str(report)
    assert report.outcomes["done"] > 5 and report.outcomes["refused"] > 20, str(report)


def test_the_fuzzer_sees_a_door_without_a_guard(tmp_path, monkeypatch, capfd):
    """The control: with the look at the manifest left out of the conversion, damages pass."""
    monkeypatch.setattr(megatron_checkpoint, "refuse_damage", lambda folder: None)
    report = Report("control", 0)
    checkpoints.try_damages(report, tmp_path, [checkpoints.convert], sample=30)
    assert report.outcomes["wrong"] >= 5 and all(line.startswith("wrong: convert: ") for line in report.failures)


def test_what_an_attempt_counts():
    report = Report("attempts", 0)

    def refuse():
        raise UserError("one line")

    def hang():
        while True:
            pass

    cases = [refuse, lambda: None, lambda: 1 / 0, hang]
    assert [attempt(report, "x", case, limit_s=0.2) for case in cases] == ["refused", "done", "traceback", "hang"]
    assert report.cases == 4 and len(report.failures) == 2 and not issubclass(TimeUp, Exception)
