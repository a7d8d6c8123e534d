"""Template and stop token of the data in an exported directory; the model card's metadata."""

import json
import re

import pytest
from huggingface_hub import ModelCard, ModelCardData

from fuserl_megatron.convert.chat_files import ChatFormat, carry_chat
from fuserl_megatron.convert.model_card import base_model, license_of, model_card, run_figures
from fuserl_megatron.testing.tiny import save_char_tokenizer
from fuserl_megatron.util.errors import UserError

TAUGHT = "{# taught #}{% for m in messages %}{{ m.content }}{% endfor %}"
LINEAGE = {"target": "meta-llama/Llama-3.1-8B", "name": "mine", "stage": "fusepo", "sources": ["a|b", "c\n# d"]}


@pytest.fixture
def directory(tmp_path):
    """A tokenizer with a template of its own."""
    save_char_tokenizer(tmp_path / "m")
    return tmp_path / "m"


def content(directory):
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def put(directory, place):
    """The source's own template, in one of the places it may have; the others emptied."""
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    values = json.loads((directory / "tokenizer_config.json").read_text())
    values.pop("chat_template", None)
    if place == "file":
        (directory / "chat_template.jinja").write_text("{# own #}")
    elif place == "config":
        values["chat_template"] = "{# own #}"
    elif place == "list":
        values["chat_template"] = [{"name": n, "template": "{# own #}"} for n in ("default", "tool_use")]
    elif place == "more files":
        (directory / "chat_template.jinja").write_text("{# own #}")
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text("{# tools #}")
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("place", ["none", "file", "config", "list", "more files"])
def test_transformers_finds_the_data_s_template_wherever_the_source_had_its_own(directory, place):
    from transformers import AutoTokenizer

    put(directory, place)
    carry_chat(directory, ChatFormat(TAUGHT), {})
    assert AutoTokenizer.from_pretrained(directory).chat_template == TAUGHT


def test_what_says_the_same_already_stays_byte_for_byte(directory):
    put(directory, "config")
    (directory / "generation_config.json").write_text('{"eos_token_id":   [5, 1]}')
    before = content(directory)
    carry_chat(directory, ChatFormat(), {})
    carry_chat(directory, ChatFormat("{# own #}", 1), {})
    assert content(directory) == before


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"eos_token_id": 2, "top_p": 0.9}, {"eos_token_id": [2, 7], "top_p": 0.9}),
        ({"_from_model_config": True, "eos_token_id": 2}, {"eos_token_id": [2, 7]}),
        ({"eos_token_id": [2, 3]}, {"eos_token_id": [2, 3, 7]}),
        ({"eos_token_id": 7}, {"eos_token_id": 7}),
        ({}, {"eos_token_id": [7]}),
        (None, {"bos_token_id": 0, "eos_token_id": [9, 7]}),  # transformers would take config.json's
    ],
)
def test_the_end_of_turn_is_added_to_the_stop_tokens(tmp_path, before, after):
    from transformers import GenerationConfig

    file = tmp_path / "generation_config.json"
    if before is not None:
        file.write_text(json.dumps(before))
    carry_chat(tmp_path, ChatFormat(None, 7), {"bos_token_id": 0, "eos_token_id": 9, "pad_token_id": None})
    assert json.loads(file.read_text()) == after
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == after["eos_token_id"]


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
def test_a_damaged_file_of_the_source_is_one_line(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError) as error:
        carry_chat(tmp_path, ChatFormat(None, 7), {})
    assert "generation_config.json" in str(error.value) and "\n" not in str(error.value)


def test_metadata_is_what_the_hub_reads():
    data = {"num_prompts": 2000, "num_responses": 9, "reward_temperature": "0.01"}
    data |= {"hub": ["HuggingFaceH4/ultra"], "files": ["a.jsonl"]}
    config = {"run": {"results_dir": "/home/me/runs/x"}, "objective": {"loss": "ln_dpo", "beta": None}}
    figures = {"val_loss": {"first": 1.23456789, "last": 0.5}}
    card = ModelCard(model_card("hf", LINEAGE | {"data": data, "config": config, "figures": figures}))
    expected = ModelCardData(
        base_model="meta-llama/Llama-3.1-8B",
        datasets=["HuggingFaceH4/ultra"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["fuserl-megatron", "fusepo"],
    )
    assert card.data.to_dict() == expected.to_dict()
    assert "\n# mine\n" in card.text and "/home" not in card.content and "null" not in card.text
    for text in ("FusePO", "loss ln_dpo", "a|b, c # d", "2,000 prompts", "| val_loss | 1.2346 | 0.5 |"):
        assert text in card.text, text


def test_the_title_is_the_run_s_name_or_says_what_it_is():
    def title(**lineage):
        return re.search(r"^# (.*)$", model_card("hf", {"target": "org/base"} | lineage), re.M)[1]

    assert (title(name="mine"), title(name="fuserl", stage="fusesft"), title()) == (
        "mine",
        "base-fusesft",
        "base-fused",
    )


def test_the_base_is_named_as_the_hub_names_it(tmp_path):
    cache = "/home/me/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/abc"
    assert base_model(cache) == base_model("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    (tmp_path / "sft" / "hf").mkdir(parents=True)
    assert base_model(str(tmp_path / "sft" / "hf")) == "sft-hf" and base_model(None) is None
    (tmp_path / "sft" / "hf" / "README.md").write_text(model_card("hf", {"target": "org/base"}))
    assert base_model(str(tmp_path / "sft" / "hf")) == "org/base"  # FusePO after FuseSFT
    (tmp_path / "config.json").write_text('{"_name_or_path": "org/name"}')
    assert base_model(str(tmp_path)) == "org/name"


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("README.md", "---\nlicense: other\nlicense_name: x\nlicense_link: y\n---\n", ["other", "x", "y"]),
        ("LICENSE.txt", "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama", ["llama3.1"]),
        ("LICENSE", "MIT License\n\nCopyright", ["mit"]),
        ("LICENSE", "All rights reserved", []),
        ("README.md", "---\n: [\n---\n", []),
    ],
)
def test_the_licence_is_the_base_s(tmp_path, file, text, expected):
    (tmp_path / file).write_text(text)
    assert list(license_of(tmp_path).values()) == expected


def test_figures_of_a_run(tmp_path):
    assert run_figures(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "lr": 1}\n{"step": 2, "loss": 1.5}\n')
    (tmp_path / "validation.jsonl").write_text('{"step": 0, "val_loss": 3, "val_prompts": 4, "val_x": null}\n')
    assert run_figures(tmp_path) == {"loss": {"first": 2.5, "last": 1.5}, "val_loss": {"first": 3, "last": 3}}
    (tmp_path / "metrics.jsonl").write_text('3\n{"torn')
    assert "loss" not in run_figures(tmp_path)
