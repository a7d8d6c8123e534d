"""`fuserl show` and `fuserl stats` on a small data set."""

import json

import pytest

from fuserl_megatron.cli import main
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.records.show import shown_prompts
from fuserl_megatron.records.stats import statistics
from fuserl_megatron.testing.tiny import save_char_tokenizer

ROWS = [
    {"prompt": "abc", "source": "s", "response": "yes", "reward": 1.0},
    {"prompt": "abc", "source": "s", "response": "no", "reward": 0.0},
    {"prompt": "abc", "source": "t", "response": "maybe", "reward": 0.5},
    {"prompt": "d", "source": "s", "response": "e", "reward": 0.25},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("show")
    save_char_tokenizer(root / "tokenizer")
    (root / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [f"inputs=[{root}/in.jsonl]", f"output={root}/fused", f"tokenizer={root}/tokenizer"]
    assert main(["build", *words, "reward_temperature=0.5"]) == 0
    return root


def test_what_is_shown_is_what_training_selects(place):
    from fuserl_megatron.records.tokenize import load_tokenizer

    dataset = FusedDataset(place / "fused")
    first, second = shown_prompts(dataset, load_tokenizer(str(place / "tokenizer"))[0], [0, 1])
    texts = ("yes", "no", "maybe")
    assert "abc" in first.text and all(r.text.startswith(t) for r, t in zip(first.responses, texts, strict=True))
    yes, no, maybe = first.responses
    # w = softmax([1, .5] / .5)
    assert yes.sft_weight == pytest.approx(0.731059, abs=1e-6) and maybe.sft_weight == pytest.approx(0.268941, abs=1e-6)
    assert (yes.side, no.side, maybe.side) == ("chosen", "rejected", "") and yes.pair_weight == 1.0
    assert second.responses[0].sft_weight == 1.0 and second.responses[0].place.endswith("in.jsonl:4")


def test_terminal_page_and_file(place, capsys, tmp_path):
    assert main(["show", str(place / "fused"), "-n", "1"]) == 0
    shown = capsys.readouterr().out
    assert "\u27e6yes" in shown and "reward 1, " in shown and "prompt 1" not in shown
    page = tmp_path / "page.html"
    assert main(["show", str(place / "in.jsonl"), f"tokenizer={place}/tokenizer", "--html", str(page)]) == 0
    assert "http" not in page.read_text() and "<pre class=scored>maybe" in page.read_text()


def test_statistics(place, capsys, tmp_path):
    found = statistics(FusedDataset(place / "fused"))
    assert found["overlap"] == {"1": 0.5, "2": 0.5} and found["repeated"] == 0
    assert found["gaps"]["mean"] == 1.0 and found["gaps"]["sources"] == 1
    assert found["rewards"]["s"]["within_prompt"] == pytest.approx(0.5**0.5)
    assert found["weights"]["0.5"]["s"] == pytest.approx((0.731059 + 1) / 2, abs=1e-6)
    assert found["fits"][max(found["fits"], key=int)] == {"response": 1.0, "pair": 1.0, "group": 1.0}
    assert main(["stats", str(place / "fused"), "--json", str(tmp_path / "s.json")]) == 0
    assert "source weights by reward_temperature" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text()) == found


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show", "nosuch"], "nosuch: does not exist"),
        (["show", "FUSED", "--prompt", "7"], "prompt 7: the data set has prompts 0 to 1"),
        (["show", "FUSED", "--prompt", "x"], "--prompt x: must be numbers"),
        (["show", "FUSED", "max_length=3"], "is built already"),
        (["stats", "nosuch"], "nosuch is not a fused data set"),
    ],
)
def test_mistakes(place, words, says, capsys):
    assert main([str(place / "fused") if word == "FUSED" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
