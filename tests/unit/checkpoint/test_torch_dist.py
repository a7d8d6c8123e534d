"""Names of folders and what the pointer says: numbers are numbers, anything else is left alone or named."""

import pytest

from fuserl_megatron.checkpoint.torch_dist import POINTER, newest_iteration, saved_iterations
from fuserl_megatron.util.errors import UserError


def test_folders_that_are_no_iterations_are_left_alone(tmp_path):
    for name in ("iter_0000002", "iter_\u00b2", "iter_\u0662", "iter_", "iter_x", "iter_-1", "iter_" + "9" * 200):
        (tmp_path / name).mkdir()
    assert saved_iterations(tmp_path) == [2]


@pytest.mark.parametrize("text", ["9" * 5000, "\u00b2", "", "x\x1b[31m", "3", "-2"])
def test_a_pointer_to_no_iteration_is_one_line(tmp_path, text):
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / POINTER).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        newest_iteration(tmp_path)
    assert POINTER in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 1000
