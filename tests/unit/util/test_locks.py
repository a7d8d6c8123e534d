"""One writer per destination: who is refused, what the message names, what is left behind."""

import errno
import fcntl
import json
import socket

import pytest

from fuserl_megatron.util import locks
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.locks import only_writer


def held(file, **words):
    """A lock that another open file holds, as another process would."""
    handle = open(file, "w")
    handle.write(json.dumps(words))
    handle.flush()
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def test_nothing_stays_but_what_was_written(tmp_path):
    with only_writer(tmp_path / "a" / "b" / ".lock", "b", "-"):
        text = json.loads((tmp_path / "a" / "b" / ".lock").read_text())
        assert text["host"] == socket.gethostname()
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path / "a" / "b" / ".lock", "b", "-"):
        (tmp_path / "a" / "kept").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "kept"]


def test_the_message_names_host_process_and_job_and_is_one_line(tmp_path):
    with held(tmp_path / ".lock", host=socket.gethostname(), pid=7, job="12\n\x1b[31m", since="2026-01-31 08:00:00"):
        with pytest.raises(UserError) as error:
            with only_writer(tmp_path / ".lock", "runs/x", "choose another run.results_dir"):
                raise AssertionError("two writers at once")
    said = str(error.value)
    assert said.startswith(f"runs/x: process 7 on {socket.gethostname()}, SLURM job 12")
    assert said.endswith("since 2026-01-31 08:00:00, writes there: wait, stop it, or choose another run.results_dir")
    assert said.isprintable()
    with only_writer(tmp_path / ".lock", "runs/x", "-"):
        pass  # free again, and whatever the file says does not matter


def test_another_host_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "SAME_HOST_S", 0.0)
    monkeypatch.setattr(locks, "OTHER_HOST_S", 0.3)
    with held(tmp_path / ".lock", host="a node that died", pid=7):
        with pytest.raises(UserError, match="a node that died"):
            with only_writer(tmp_path / ".lock", "runs/x", "-"):
                raise AssertionError("two writers at once")
    assert "waiting up to 0.3 s" in capsys.readouterr().err


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_writer(tmp_path / ".lock", "runs/x", "-"):
        assert "has no locks" in capsys.readouterr().err


def test_a_lock_whose_name_went_away_is_no_lock(tmp_path, monkeypatch):
    """Between opening the file and locking it the holder may have removed its name: the next one would make a new."""
    real, removed = fcntl.flock, []

    def remove_first(handle, how):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with only_writer(tmp_path / ".lock", "runs/x", "-"):
        assert removed and (tmp_path / ".lock").exists()


def test_a_place_that_cannot_be_written_is_one_line_with_advice(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in ("file", "file/x", "made/file"):
        if folder.startswith("made"):  # the file system turns read-only after the folder was made
            monkeypatch.setattr(locks, "_acquire", lambda file, *_: (_ for _ in ()).throw(OSError(30, "Read-only")))
        with pytest.raises(UserError, match=r"^runs/x: cannot be created \((a file is in the way|Read-only)\); choose"):
            with only_writer(tmp_path / folder / ".lock", "runs/x", "choose another run.results_dir"):
                raise AssertionError("nothing can be written there")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
