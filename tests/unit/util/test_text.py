"""Text of others on a terminal."""

import pytest

from fuserl_megatron.util.text import printable, shortened


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, [/x] {y} 100%", "plain, [/x] {y} 100%"),
        ("größe 中文 👩\u200d💻", "größe 中文 👩\u200d💻"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\u202eevil\u2028", "\\u202eevil\\u2028"),
        ("\ud800 half a surrogate", "\\ud800 half a surrogate"),
    ],
)
def test_controls_are_shown_as_escapes(text, shown):
    assert printable(text) == shown


def test_what_is_kept_and_what_is_long():
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert shortened("x" * 300) == "x" * 200 + "... (300 characters)"
