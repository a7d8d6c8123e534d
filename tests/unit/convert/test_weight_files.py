"""Headers of safetensors files that are none: one line that names the file."""

import json
import struct

import pytest

from fuserl_megatron.convert.weight_files import read_header
from fuserl_megatron.util.errors import UserError


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000 + "]" * 100_000,
        json.dumps({"w": {"dtype": "F32", "shape": [4.0, 4.0], "data_offsets": [0, 64]}}),
        json.dumps({"w": {"dtype": "F32", "shape": [16], "data_offsets": []}}),
        json.dumps({"w": {"dtype": "F32", "shape": [True] * 16, "data_offsets": [0, 64]}}),
        json.dumps({"w": {"dtype": ["F32"], "shape": [16], "data_offsets": [0, 64]}}),
        '{"w": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 64]}}',
        "3",
        "\x00",
    ],
)
def test_a_header_that_is_none_is_one_line(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 64)
    with pytest.raises(UserError, match="fetch the file again") as error:
        read_header(file)
    assert str(error.value).startswith(str(file)) and len(str(error.value).splitlines()) == 1
