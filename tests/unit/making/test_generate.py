"""`fuserl generate` on a tiny model: what it prints is what transformers generates after the template's prompt."""

import json

import pytest

from fuserl_megatron.cli import main
from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path)
    save_char_tokenizer(path)
    return str(path)


def test_greedy_answers_side_by_side(model, tmp_path, capsys):
    words = ["--prompt", "abc", "--max-new-tokens", "6", "--json", str(tmp_path / "out.jsonl")]
    assert main(["generate", model, model, *words]) == 0
    out = capsys.readouterr().out
    assert out.count(">>> abc") == 1 and out.count(f"--- {model}") == 2
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["answers"] == second["answers"] and first["prompt"] == [{"role": "user", "content": "abc"}]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(
        first["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = AutoModelForCausalLM.from_pretrained(model).generate(**ids, max_new_tokens=6, do_sample=False)
    text = tokenizer.decode(expected[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert first["answers"][0]["text"] == text


def test_sampled_answers_of_a_file(model, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abc"))
    words = ["--prompts", str(tmp_path / "p.jsonl"), "--first", "2", "--count", "2", "--temperature", "1"]
    assert main(["generate", model, *words, "--max-new-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count(">>> ") == 2 and out.count("--- ") == 4 and ">>> c" not in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nosuch", "--prompt", "x"], "nosuch: no such directory"),
        (["MODEL", "--prompt", "x", "--count", "2"], "--temperature 0: must be 0 (greedy, one answer) or above"),
        (["MODEL", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    ],
)
def test_mistakes(model, words, says, capsys):
    assert main(["generate", *[model if word == "MODEL" else word for word in words]]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
