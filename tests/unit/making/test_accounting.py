"""Rows exactly once: torn ends, duplicates, plans, what is missing and what is read back."""

import json

import numpy as np
import pytest

from fuserl_megatron.making import accounting
from fuserl_megatron.making.accounting import Account, Plan
from fuserl_megatron.making.finished import account_directories, finished_lines, finished_rows
from fuserl_megatron.making.parts import key_array, key_of, num_parts, part_file, scan
from fuserl_megatron.util.errors import UserError

PLAN = Plan(settings={"model": "m", "sampling": {"temperature": 0.8}}, notes={"n": 4})


def keys_of(count: int) -> np.ndarray:
    return key_array(key_of("prompt", i) for i in range(count))


def fill(directory, count, plan=PLAN, finish=True, upto=None):
    """Append what is missing, at most up to row `upto`; returns how many rows were made."""
    with Account(directory, plan, keys_of(count)) as account:
        made = 0
        for i in account.missing():
            if upto is not None and i >= upto:
                break
            account.append(i, {"i": int(i), "text": "zwölf\u2028" + "x" * int(i)})
            made += 1
        if finish:
            account.finish({"seconds": 1})
    return made


def test_rows_are_made_once_and_read_in_the_order_asked_for(tmp_path):
    assert fill(tmp_path, 10, finish=False, upto=4) == 4
    with pytest.raises(UserError, match="not finished"):
        list(finished_rows(tmp_path))
    assert fill(tmp_path, 10) == 6
    assert fill(tmp_path, 10) == 0
    assert [row["i"] for row in finished_rows(tmp_path)] == list(range(10))
    with Account(tmp_path, PLAN, keys_of(10)[::-1].copy()) as account:  # the same rows in another order
        assert account.have.all() and not account.is_finished()
        account.finish({})
        assert account.is_finished()
    assert [row["i"] for row in finished_rows(tmp_path)] == list(range(10))[::-1]
    (file, line), text = next(finished_lines(tmp_path))
    assert (file, line) == (str(part_file(tmp_path, 0)), 10) and json.loads(text)["i"] == 9


def test_growing_makes_only_what_is_new_and_shrinking_reads_only_what_is_asked_for(tmp_path):
    fill(tmp_path, 6)
    assert fill(tmp_path, 9) == 3
    assert fill(tmp_path, 5) == 0
    assert [row["i"] for row in finished_rows(tmp_path)] == list(range(5))
    done = json.loads((tmp_path / "done.json").read_text())
    assert (done["rows"], done["extra"]) == (5, 4)
    assert fill(tmp_path, 9) == 0


def test_a_line_torn_at_any_byte_is_cut_and_made_again(tmp_path):
    fill(tmp_path, 3, finish=False)
    part = part_file(tmp_path, 0)
    whole = part.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for size in range(last, len(whole)):
        part.write_bytes(whole[:size])
        with Account(tmp_path, PLAN, keys_of(3)) as account:
            assert account.missing().tolist() == [2]
            assert bool(account.torn) == (size > last), account.torn
            account.append(2, {"i": 2, "text": "again"})
        assert scan(tmp_path).keys.tobytes() == keys_of(3).tobytes()
    part.write_bytes(whole[:last] + bytes(4096))  # what a power failure leaves of a file on some file systems
    assert fill(tmp_path, 3) == 1


def test_rows_in_many_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(accounting, "PART_BYTES", 200)
    fill(tmp_path, 40, upto=15, finish=False)
    fill(tmp_path, 40)
    assert num_parts(tmp_path) > 10
    assert [row["i"] for row in finished_rows(tmp_path)] == list(range(40))
    for (file, line), text in finished_lines(tmp_path):
        with open(file, "rb") as lines:
            assert lines.readlines()[line - 1] == text
    part_file(tmp_path, 3).unlink()
    with pytest.raises(UserError, match="part-00003.jsonl: missing"):
        fill(tmp_path, 40)


def spoil(part, what):
    lines = part.read_bytes().splitlines(keepends=True)
    if what == "twice":
        lines.append(lines[1])
    elif what == "middle":
        lines[1] = lines[1][:20] + b"\n"
    elif what == "key":
        lines[1] = lines[1].replace(lines[1][8:12], b"zzzz")
    elif what == "space":
        lines[1] = lines[1].replace(lines[1][8:12], b"    ")
    part.write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("twice", "part-00000.jsonl:5: the same row as .*part-00000.jsonl:2"),
        ("middle", "part-00000.jsonl:2: not a row"),
        ("key", "not 32 hexadecimal digits"),
        ("space", "not 32 hexadecimal digits"),
    ],
)
def test_damage_that_is_no_torn_end_stops(tmp_path, what, message):
    fill(tmp_path, 4, finish=False)
    spoil(part_file(tmp_path, 0), what)
    with pytest.raises(UserError, match=message) as caught:
        fill(tmp_path, 4)
    assert "\n" not in str(caught.value)


def test_a_part_that_was_changed_after_the_end_is_not_read(tmp_path):
    fill(tmp_path, 3)
    with open(part_file(tmp_path, 0), "ab") as file:
        file.write(b"{}\n")
    with pytest.raises(UserError, match="changed after the end"):
        list(finished_rows(tmp_path))


@pytest.mark.parametrize(
    ("settings", "notes", "difference"),
    [
        (PLAN.settings, {"n": 8}, None),
        ({"sampling": {"temperature": 0.8}, "model": "m"}, {}, None),
        ({"model": "m", "sampling": {"temperature": 0.7}}, {}, r"sampling.temperature 0.8 there, 0.7 here"),
        ({"model": "o", "sampling": {"temperature": 0.8}}, {}, r"model m there, o here"),
        ({"model": "m", "sampling": {"temperature": 0.8, "top_k": 4}}, {}, r"sampling.top_k null there, 4 here"),
    ],
)
def test_what_may_change_and_what_may_not(tmp_path, settings, notes, difference):
    fill(tmp_path, 3, finish=False)
    before = part_file(tmp_path, 0).read_bytes()
    if difference is None:
        fill(tmp_path, 3, Plan(settings=settings, notes=notes))
    else:
        with pytest.raises(UserError, match=difference):
            fill(tmp_path, 3, Plan(settings=settings, notes=notes))
    assert part_file(tmp_path, 0).read_bytes() == before


def test_failures_are_of_the_last_run_and_do_not_hinder_the_end(tmp_path):
    with Account(tmp_path, PLAN, keys_of(3)) as account:
        account.append(0, {"i": 0})
        account.fail(1, {"reason": "too long"})
        with pytest.raises(ValueError, match="1 rows"):
            account.finish({})
        account.append(2, {"i": 2})
        with pytest.raises(ValueError, match="there already"):
            account.append(2, {"i": 2})
        account.finish({})
    with Account(tmp_path, PLAN, keys_of(3)) as account:
        assert account.is_finished()
    assert [row["i"] for row in finished_rows(tmp_path)] == [0, 2]
    failures = (tmp_path / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in failures] == ["too long"]
    assert fill(tmp_path, 3) == 1
    assert not (tmp_path / "failures.jsonl").read_text()


def test_an_account_in_which_everything_failed(tmp_path):
    with Account(tmp_path, PLAN, keys_of(2)) as account:
        account.fail(0, {})
        account.fail(1, {})
        assert account.finish({})["failed"] == 2
    assert list(finished_rows(tmp_path)) == []


def test_a_second_writer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fuserl_megatron.util.locks.SAME_HOST_S", 0.0)
    with Account(tmp_path, PLAN, keys_of(3)), pytest.raises(UserError, match="writes there"):
        fill(tmp_path, 3)


def test_directories_of_a_run(tmp_path):
    for source in ("b", "a"):
        fill(tmp_path / source, 2)
    assert account_directories(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert account_directories(tmp_path / "a") == [tmp_path / "a"]
    with pytest.raises(UserError, match="no such directory"):
        account_directories(tmp_path / "c")


def test_a_full_disk_takes_half_a_line_and_it_is_taken_back(tmp_path, monkeypatch):
    with Account(tmp_path, PLAN, keys_of(2)) as account:
        account.append(0, {"i": 0})
        size = part_file(tmp_path, 0).stat().st_size
        write = accounting.os.write

        def full(handle, data):
            if len(data) < 10:
                raise OSError(28, "No space left on device")
            return write(handle, data[: len(data) // 2])

        monkeypatch.setattr(accounting.os, "write", full)
        with pytest.raises(UserError, match="No space left on device"):
            account.append(1, {"i": 1})
        assert part_file(tmp_path, 0).stat().st_size == size
