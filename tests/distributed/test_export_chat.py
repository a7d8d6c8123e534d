"""A base model is taught a chat template: its export renders it, stops at its end of turn, and says what it is."""

import json
from pathlib import Path

import pytest
from fusion_case import SFT, make_config, run

from fuserl_megatron.testing.tiny import CHATML, save_char_tokenizer, save_tiny_model


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory):
    """A base model (no template, another eos token, a licence), data with a template of their own, 60 steps."""
    from fuserl_megatron.config.schema import BuildConfig
    from fuserl_megatron.records.build import build

    root = tmp_path_factory.mktemp("chat")
    model, template = root / "base", root / "own.jinja"
    save_tiny_model(model, seed=3, scale=1.0)
    save_char_tokenizer(model, chat_template=None)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).is_file():
            values = json.loads((model / name).read_text())
            (model / name).write_text(json.dumps(values | {"eos_token": "<unk>"}))
    (model / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.7, "do_sample": true}')
    (model / "LICENSE").write_text("\n   Apache License\n   Version 2.0, January 2004\n")
    template.write_text("{# taught #}" + CHATML)
    records = [
        dict(prompt=p, source=s, response="ok", reward=r) for p in ("one", "two") for s, r in (("a", 1), ("b", 2))
    ]
    (root / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    settings = dict(inputs=(str(root / "in.jsonl"),), output=str(root / "data"), tokenizer=str(model))
    build(BuildConfig(**settings, reward_temperature=1.0, chat_template=str(template)), progress=False)
    paths = {"policy": str(model), "data": str(root / "data"), "reference": str(model)}
    config = make_config(
        paths, SFT, global_batch_size=2, max_steps=60, lr=1e-2, every=60, results_dir=str(root / "run"), tp=2
    )
    assert ranks.run(run, 2, config) == [0, 0]
    return root


@pytest.fixture(scope="module", params=["train", "convert"])
def exported(request, trained):
    """What training writes, and what the stage `export` makes of the run's checkpoint."""
    if request.param == "train":
        return trained / "run" / "hf"
    from fuserl_megatron.convert.offline import megatron_to_hf

    return megatron_to_hf(trained / "run", trained / "converted")


def test_the_template_is_the_one_of_the_data(trained, exported):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.chat_template == (trained / "own.jinja").read_text()
    chat = [{"role": "user", "content": "one"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    from fuserl_megatron.data.dataset import FusedDataset

    assert ids == FusedDataset(trained / "data").prompt(0).tolist()


def test_generation_stops_where_the_data_end_a_turn(trained, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    settings = json.loads((exported / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [2, 1], "temperature": 0.7, "do_sample": True}  # what was there stays
    chat = [{"role": "user", "content": "two"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "ok<|im_end|>"


def test_the_card_is_valid_and_holds_no_path(trained, exported):
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["license"], data["library_name"]) == ("base", "apache-2.0", "transformers")
    assert data["tags"] == ["fuserl-megatron", "fusesft"] and data["pipeline_tag"] == "text-generation"
    assert "\n# base-fusesft\n" in card.content or "\n# run\n" in card.content
    assert "# hf" not in card.content and str(trained) not in card.content and "null" not in card.text
    for text in ("sources: a, b", "2 prompts, 4 responses", "reward temperature 1.0", "| loss |", "model.generate("):
        assert text in card.text, text
    assert "data_manifest.json" in {file.name for file in Path(trained / "run").iterdir()}
