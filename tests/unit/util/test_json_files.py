"""Every kind of bad file, as one line that names it; the value where it is good."""

import json
import os

import pytest

from fuserl_megatron.util.json_files import BadFile, is_plain_name, read_bytes, read_json, write_json

BAD = {
    "no JSON": (b"{", "not a list of things (Expecting"),
    "no object": (b"[1]", "holds a list, not a JSON object"),
    "no UTF-8": (b'{"a": "\xff"}', "not a list of things ('utf-8' codec"),
    "an integer of 5,000 digits": (b'{"a": %s}' % (b"7" * 5000), "not a list of things (Exceeds the limit"),
    "nested past Python's limit": (b"[" * 100000, "nested too deeply"),
    "nested past ours": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested too deeply"),
    "empty": (b"", "not a list of things (Expecting"),
    "too large": (b" " * 300001, "300001 bytes, more than the 300000 that are read"),
}


def error_of(file, **options):
    with pytest.raises(BadFile) as caught:
        read_json(file, "a list of things", "write it again", **options)
    line = str(caught.value)
    assert line.startswith(f"{file}: ") and line.endswith("; write it again") and "\n" not in line
    return caught.value.reason


@pytest.mark.parametrize("kind", BAD)
def test_what_is_bad_is_one_line(tmp_path, kind):
    content, said = BAD[kind]
    (tmp_path / "x.json").write_bytes(content)
    assert said in error_of(tmp_path / "x.json", limit=300000)


def test_what_is_no_file_is_one_line_and_never_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert error_of(tmp_path / "pipe") == error_of(tmp_path) == "not a regular file"
    assert error_of(tmp_path / "none") == "no such file"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "symbolic links" in error_of(tmp_path / "loop")


def test_good_files_come_back_as_they_were_written(tmp_path):
    content = {"é": [1, 2.5, None, {"deep": [[[]]]}], "half a surrogate": "\ud800", "big": 10**4000}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content == json.loads(read_bytes(tmp_path / "x.json"))


def test_plain_names():
    assert all(map(is_plain_name, ["a", "a b.json", "..a", "é"]))
    assert not any(map(is_plain_name, ["", ".", "..", "a/b", "/a", "../a", "a\0"]))
