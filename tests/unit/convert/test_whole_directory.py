"""Directories that are whole or not there: what the refusal for lack of space says."""

import shutil
from types import SimpleNamespace

import pytest

from fuserl_megatron.config.schema import UserError
from fuserl_megatron.convert import whole_directory


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
        whole_directory.create_partial(tmp_path / "out", 400_000)
    assert list(tmp_path.iterdir()) == []
