"""A long text is cut before it is tokenised, and its first tokens are those of the whole."""

import random
import time

import pytest
from test_template_battery import byte_level, sentence_piece

from fuserl_megatron.records.shorten import Shortener
from fuserl_megatron.records.tokenize import BadPrompt, ChatTokenizer

WORDS = [
    "the",
    "The",
    "in",
    "hell",
    "x",
    "I",
    "It",
    "\u4e16\u754c",
    "e\u0301",
    "12",
    "(",
    "...",
    "</s>",
    "<0x41>",
    "\U0001f44b",
]
GAPS = [" ", " ", " ", "  ", "\n", "\n\n", "", "\t", " \n "]
TEXTS = {
    "words": lambda r: "".join(r.choice(WORDS) + r.choice(GAPS) for _ in range(4000)),
    "one letter": lambda r: "a" * 12_000,
    "pattern": lambda r: "thin" * 3_000,
    "one script without spaces": lambda r: "".join(chr(0x4E00 + r.randrange(3000)) for _ in range(20_000)),
    "spaces": lambda r: "a" + " " * 12_000,
    "newlines": lambda r: "\n" * 12_000,
    "marks": lambda r: "</s>" * 3_000,
    "no letters": lambda r: "".join(r.choice("0123456789,. ()\n") for _ in range(12_000)),
}  # fmt: skip


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("kind", TEXTS)
def test_the_first_tokens_are_those_of_the_whole(make, kind):
    backend = make(["<s>", "</s>"], kind == "marks")
    asked, cuts = [], 0

    def ids(text):
        asked.append(len(text))
        return backend.encode(text, add_special_tokens=False).ids

    shorten = Shortener(ids, lambda: backend.get_vocab())
    for seed in range(2):
        text = TEXTS[kind](random.Random(seed))
        whole = ids(text)
        for num_tokens in (1, 7, 100, 300):
            asked.clear()
            head = shorten(text, num_tokens)
            assert text.startswith(head)
            assert ids(head)[:num_tokens] == whole[:num_tokens]
            if len(head) < len(text):
                cuts += 1
                assert len(ids(head)) >= num_tokens and max(asked) < len(text)
    assert cuts or kind in ("spaces", "newlines", "marks")


def test_words_across_spaces_make_no_place_safe():
    shorten = Shortener(lambda text: list(range(len(text))), lambda: ["a", "b\u0120c"])
    assert shorten._place("ab cd" * 9999, 5000) == 0
    assert Shortener(shorten._ids, lambda: ["a", "\u0120c", ".\u010a"])._place("ab cd" * 9999, 5000) > 4990


def test_long_tokens_make_it_read_on():
    def ids(text):
        return [len(word) for word in text.split()]

    text = "x" * 3000 + " " + "y" * 2000 + " " + "z " * 9000
    shorten = Shortener(ids, list)
    for num_tokens in (1, 2, 3, 500):
        assert ids(shorten(text, num_tokens))[:num_tokens] == ids(text)[:num_tokens]
    assert len(shorten(text, 3)) < len(text)
    assert shorten("x" * 90_000, 1) == "x" * 90_000


def test_ten_megabytes_cost_what_their_first_tokens_cost(tokenizers_dir):
    """Whole, each of these takes more than ten seconds and gigabytes."""
    tokenizer = ChatTokenizer(tokenizers_dir["chatml"], max_length=300)
    prompt = tokenizer.encode_prompt((("user", "Hi"),))
    texts = ["the hill in hell " * 600_000, "a" * 10_000_000, "\u4e16\u754c" * 5_000_000]
    start = time.thread_time()
    for text, result in zip(texts, tokenizer.encode_responses(prompt, [(t, ("f", 1)) for t in texts]), strict=True):
        assert result.truncated and len(result.tokens) == 300 - len(prompt.tokens)
        assert result.tokens == tokenizer._ids(text[:2000])[: len(result.tokens)]
    for text in texts:
        with pytest.raises(BadPrompt, match="the prompt has more than 300 tokens"):
            tokenizer.encode_prompt((("user", text),))
    assert time.thread_time() - start < 8
