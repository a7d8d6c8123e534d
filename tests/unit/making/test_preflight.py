"""What is wrong with a server, its prompt or its settings is one line before anything is sampled."""

import dataclasses
from pathlib import Path

import pytest
from aiohttp import web

from fuserl_megatron.making import preflight, prompt_proof
from fuserl_megatron.making.prompt_proof import SourceTokenizer
from fuserl_megatron.making.sample import sample
from fuserl_megatron.util.errors import UserError

KNOWN = {"model", "messages", "prompt", "temperature", "top_p", "max_tokens", "stop", "seed", "n", "top_k"}
KNOWN |= {"return_token_ids", "chat_template_kwargs"}


class Letters:
    """A tokenizer as the stub's: a token a character, BOS 1 where `adds`, generation prompt 2."""

    chat_template, bos_token_id = "there", 1

    def __init__(self, adds=True):
        self.adds = adds

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(c) for c in text.replace("\x02", "")] + [2] * text.count("\x02")
        return {"input_ids": [1] * (self.adds and add_special_tokens) + ids}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **_kwargs):
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return "\x01" * self.adds + text + "\x02" * add_generation_prompt

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture
def with_tokenizer(monkeypatch):
    """A function that gives every source this tokenizer."""

    def give(tokenizer, family=""):
        monkeypatch.setattr(preflight, "load_tokenizer", lambda config: SourceTokenizer(tokenizer, family))

    return give


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(preflight, "PAUSE_S", 0.01)


def complaint(config, source):
    with pytest.raises(UserError) as caught:
        sample(config, [source])
    assert "\n" not in str(caught.value)
    assert not list(Path(config.output).rglob("part-*")), "something was sampled"
    return str(caught.value)


def facts(config, source, capsys):
    sample(config, [source])
    return capsys.readouterr().out


def test_no_server(settings, stub):
    config, source = settings(source={"url": ("http://127.0.0.1:9/v1",)})
    assert "http://127.0.0.1:9/v1: no connection" in complaint(config, source)


def test_wrong_model_name(settings, stub):
    stub.models = ["smollm2", "gemma"]
    config, source = settings(source={"model": "smolm2"})
    message = complaint(config, source)
    assert "model=smolm2: " in message and "has smollm2, gemma. Did you mean smollm2?" in message
    stub.models = None  # a server without the page: the request itself tells
    stub.script = lambda body: web.json_response({"error": {"message": "model not found"}}, status=404)
    assert "HTTP 404: model not found" in complaint(config, source)


def test_refused_key(settings, stub):
    stub.script = lambda body: web.json_response({"error": {"message": "no"}}, status=401)
    assert "HTTP 401: no; see api_key_env" in complaint(*settings())


def test_misspelt_sampling_key(settings, stub):
    stub.fields = KNOWN
    config, source = settings(sampling={"extra_body": {"repetition_penalti": 1.1}})
    message = complaint(config, source)
    assert "sampling.extra_body.repetition_penalti: the server knows no such field" in message
    config, source = settings(sampling={"min_p": 0.1})
    assert "sampling.min_p: the server knows no such field" in complaint(config, source)


def test_fields_that_cannot_be_proved_are_said(settings, stub, capsys):
    config, source = settings(sampling={"top_k": 4})
    assert "not proved: whether the server, which lists no fields, obeys top_k" in facts(config, source, capsys)


def test_context_too_small(settings, stub, capsys):
    stub.tokenizes, stub.context = True, 110
    config, source = settings(11)
    message = complaint(config, source)
    assert "prompts.jsonl:11 has 18 tokens, with max_tokens=100 118, but the server's context is 110" in message
    assert "does not fit, such answers are cut" in facts(
        dataclasses.replace(config, on_too_long="allow"), source, capsys
    )


def test_one_begin_of_text_is_fine(settings, stub, with_tokenizer, capsys):
    stub.fields, stub.bos = KNOWN, [1]
    with_tokenizer(Letters())
    out = facts(*settings(), capsys)
    assert "prompt proved as the source's tokenizer has it: 22 tokens, begins with one begin-of-text token" in out


@pytest.mark.parametrize("own", [True, False], ids=["tokenizer", "server alone"])
def test_doubled_begin_of_text(settings, stub, with_tokenizer, own):
    stub.fields, stub.bos, stub.tokenizes = KNOWN, [1, 1], True
    if own:
        with_tokenizer(Letters())
    assert "begins with two begin-of-text tokens ([1, 1, " in complaint(*settings())


def test_lost_begin_of_text(settings, stub, with_tokenizer):
    stub.fields = KNOWN
    with_tokenizer(Letters())
    assert "begins without the begin-of-text token" in complaint(*settings())
    # what the GGUF files of Gemma become: the tokenizer has lost it, too, and agrees with the server
    with_tokenizer(Letters(adds=False), family="gemma3_text")
    assert "begins without the begin-of-text token" in complaint(*settings())
    assert "tokenizer" in complaint(*settings(source={"bos": "one"}))
    with_tokenizer(Letters(adds=False))
    config, source = settings()
    assert sample(config, [source]) == 0


def test_completion_source(settings, stub, with_tokenizer, capsys):
    stub.fields, stub.bos = KNOWN, [1]
    with_tokenizer(Letters())
    config, source = settings(source={"kind": "completion", "prompt_format": "Q: {prompt}"})
    assert "begins with one begin-of-text token" in facts(config, source, capsys)
    source = dataclasses.replace(source, bos="none", name="b")
    assert "bos=none says it must not" in complaint(dataclasses.replace(config, output=config.output + "2"), source)


def test_lost_generation_prompt(settings, stub, with_tokenizer):
    stub.fields, stub.bos, stub.ends = KNOWN, [1], False
    with_tokenizer(Letters())
    assert "lacks the end of the template, '\\x02': add the generation prompt" in complaint(*settings())


def test_wrong_template(settings, stub, with_tokenizer):
    stub.fields, stub.bos = KNOWN, [1]
    tokenizer = Letters()
    tokenizer.apply_chat_template = lambda messages, **_: "\x01[INST]" + messages[0]["content"] + "[/INST]"
    with_tokenizer(tokenizer)
    message = complaint(*settings())
    assert "the prompt differs (22 and 28 tokens; ends with" in message and "another template" in message


def test_counts_alone(settings, stub, with_tokenizer, capsys):
    """A server that tells no ids, such as `transformers serve` or a paid one, still counts."""
    stub.bos = [1]
    with_tokenizer(Letters())
    assert "prompt proved by its number of tokens alone (22)" in facts(*settings(), capsys)
    stub.bos = [1, 1]
    config, source = settings(source={"name": "b"})
    assert "counts 23 tokens in a prompt that has 22" in complaint(
        dataclasses.replace(config, output=config.output + "2"), source
    )


def test_a_base_model_is_no_chat_source(settings, stub, tmp_path, monkeypatch):
    import transformers

    class Base(Letters):
        chat_template = None

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Base())
    with pytest.raises(UserError, match="no chat template, so it is a base model: ask it with kind=completion"):
        prompt_proof.load_tokenizer(settings(source={"tokenizer": str(tmp_path)})[1])


def test_a_tokenizer_that_is_not_there(settings, stub, tmp_path):
    assert "cannot be opened" in complaint(*settings(source={"tokenizer": str(tmp_path / "none")}))
