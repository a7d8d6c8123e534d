"""Copying in parts: everything once and in order, about equal shares, and one failure stops all."""

import os
import threading
import time

import pytest
import torch

from fuserl_megatron.convert import copying
from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.convert.names import megatron_names
from tests.unit.convert.conftest import make_config


@pytest.fixture
def shape(monkeypatch):
    monkeypatch.setattr(copying, "usable_cores", lambda: 8)
    return read_config(make_config(num_hidden_layers=12))


def test_every_parameter_is_in_one_part_and_the_parts_lie_together(shape):
    parts = copying.in_parts(shape, lambda number, names, window: (number, names))
    assert [number for number, _ in parts] == [0, 1, 2, 3]
    assert [name for _, names in parts for name in names] == megatron_names(shape)
    assert max(len(names) for _, names in parts) < len(megatron_names(shape)) / 2


def test_parts_run_side_by_side_and_never_more_than_cores_or_asked_for(shape, monkeypatch):
    meeting = threading.Barrier(4, timeout=600)  # passes only when four are there at once
    assert sorted(copying.in_parts(shape, lambda number, *_: meeting.wait() >= 0)) == [True] * 4
    assert copying.in_parts(shape, lambda number, *_: number, threads=1) == [0]
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})  # as a scheduler or container sets it
    assert copying.in_parts(shape, lambda number, *_: number) == [0, 1]


@pytest.mark.parametrize("error", [ValueError("no such tensor"), OSError("no space")])
def test_the_first_error_stops_the_others_and_is_the_one_raised(shape, error):
    stopped = []

    def work(number, names, window):
        if number == 2:
            raise error
        try:
            for _ in window.pieces(10**6, (4,), torch.float32):
                time.sleep(0.01)
        except RuntimeError:
            stopped.append(number)
            raise

    started = time.monotonic()
    with pytest.raises(type(error), match=str(error)):
        copying.in_parts(shape, work)
    assert sorted(stopped) == [0, 1, 3] and time.monotonic() - started < 5


def test_pieces_of_a_window_are_all_rows_once(monkeypatch):
    monkeypatch.setattr(copying, "WINDOW_BYTES", 100)
    window = copying.Window(threading.Event())
    seen = []
    for first, memory in window.pieces(11, (2, 3), torch.float32):  # 24 bytes a row, four in a window
        assert memory.shape[1:] == (2, 3)
        seen += range(first, first + len(memory))
    assert seen == list(range(11))
    ((first, memory),) = window.pieces(1, (64,), torch.float64)  # a row longer than the window
    assert (first, memory.shape) == (0, (1, 64))
