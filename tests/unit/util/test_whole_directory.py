"""Directories that are whole or not there: what the refusal for lack of space says."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fuserl_megatron.util import whole_directory
from fuserl_megatron.util.errors import UserError


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0.00 kB"), (777, "0.78 kB"), (262144, "262.14 kB"), (1310720, "1.31 MB"), (16_070_000_000, "16.07 GB")],
)
def test_sizes_in_a_unit_that_shows_them(num_bytes, text):
    assert whole_directory.size(num_bytes) == text


def test_what_is_replaced_but_cannot_be_removed_is_named(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(UserError, match=r"written, but .* \(Permission denied\); remove .*/\.out\.replaced-"):
        with whole_directory.whole_directory(tmp_path / "out", needed_bytes=0, source_dir=None, force=True) as partial:
            (partial / "new").touch()
    assert (tmp_path / "out" / "new").exists()


def test_a_small_disk_is_refused_in_figures_that_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=262144))
    with pytest.raises(UserError, match=r"needs 1\.45 MB but its disk has 262\.14 kB free"):
        whole_directory.create_partial(tmp_path / "out", 400_000, source_dir=None, force=False)
    assert list(tmp_path.iterdir()) == []


def run(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


HOLD = """
from fuserl_megatron.util.whole_directory import whole_directory
with whole_directory({out!r}, needed_bytes=0, source_dir=None, force=True) as partial:
    (partial / "of the other").touch()
    print(partial, flush=True)
    import time
    time.sleep(600)
"""


def test_a_second_writer_is_refused_and_the_first_one_s_scratch_stays(tmp_path):
    other = run(HOLD.format(out=str(tmp_path / "out")))
    try:
        scratch = Path(other.stdout.readline().strip())
        with pytest.raises(UserError, match=rf"out: process {other.pid} on \S+, since .*writes there: wait, stop"):
            with whole_directory.whole_directory(tmp_path / "out", needed_bytes=0, source_dir=None, force=True):
                raise AssertionError("two writers at once")
        assert (scratch / "of the other").exists()
    finally:
        other.kill()
        other.wait()
    # killed: its lock is free, and what it left is removed
    with whole_directory.whole_directory(tmp_path / "out", needed_bytes=0, source_dir=None, force=True) as partial:
        (partial / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_what_a_killed_writer_had_moved_aside_is_put_back(tmp_path):
    aside = tmp_path / ".out.replaced-1-abcd"
    aside.mkdir()
    (aside / "old").touch()
    with pytest.raises(UserError, match="not empty"):
        with whole_directory.whole_directory(tmp_path / "out", needed_bytes=0, source_dir=None, force=False):
            raise AssertionError("the old one was replaced unasked")
    assert (tmp_path / "out" / "old").exists() and not aside.exists()
