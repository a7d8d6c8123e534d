"""A reward depends neither on batch, order nor padding and is read at the last token; what is no reward model."""

import random
import shutil

import pytest
import torch
from making_helpers import sample
from transformers import AutoModelForSequenceClassification

from fuserl_megatron.config.score_sections import ModelReward
from fuserl_megatron.making.conversation import Unscorable
from fuserl_megatron.making.reward_model import RewardModel, hidden_states, last_positions
from fuserl_megatron.testing.tiny import save_tiny_reward_model
from fuserl_megatron.util.errors import UserError

PAD = 1  # <|im_end|>


def load(directory, **settings):
    return RewardModel("rm", ModelReward(model=str(directory), **settings))


@pytest.fixture(scope="module")
def ours(reward_model_dir):
    return load(reward_model_dir)


@pytest.fixture(scope="module")
def theirs(reward_model_dir):
    return AutoModelForSequenceClassification.from_pretrained(reward_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples():
    rng = random.Random(0)
    return [sample(f"Question {i}", "word " * rng.randint(0, 9) + str(i)) for i in range(66)]


@pytest.fixture(scope="module")
def expected(ours, theirs, samples):
    return [by_hand(theirs, ours, item) for item in samples]


def by_hand(theirs, ours, item):
    """The head on the hidden state of the last token of the row alone."""
    ids = torch.tensor([ours.tokens(item.messages, item.response)])
    with torch.no_grad():
        return theirs.score(theirs.model(ids).last_hidden_state[0, -1]).item()


def values(model, samples):
    found = dict(model.outcomes(enumerate(samples)))
    return [found[i]["value"] for i in range(len(samples))]


def test_pad_is_eos_and_the_last_token_is_read_all_the_same(ours, theirs, samples):
    item = samples[0]
    ids = torch.tensor([ours.tokens(item.messages, item.response)])
    assert ids[0, -1] == PAD == theirs.config.pad_token_id
    expected = by_hand(theirs, ours, item)
    with torch.no_grad():
        plain = theirs(ids).logits[0, 0].item()
        early = theirs.score(theirs.model(ids).last_hidden_state[0, -2]).item()
    assert plain == pytest.approx(early, abs=1e-5)  # the trap: one token early, without a word
    assert abs(plain - expected) > 1e-2
    assert ours.score([ids[0].tolist()])[0]["value"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_same_number_whatever_the_batch(reward_model_dir, samples, expected, batch):
    model = load(reward_model_dir, batch_tokens=batch * 100)
    samples = samples[: max(batch + 2, 16)]
    assert values(model, samples) == pytest.approx(expected[: len(samples)], abs=1e-5)
    assert values(model, samples[::-1])[::-1] == pytest.approx(expected[: len(samples)], abs=1e-5)
    assert max(expected) - min(expected) > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_same_number_whatever_the_padding_side(ours, theirs, samples, expected, side):
    tokenizer = ours.conversation.tokenizer
    texts = [ours.conversation.text(item.messages, item.response) for item in samples[:8]]
    batch = tokenizer(texts, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        hidden = hidden_states(theirs.model, batch["input_ids"], batch["attention_mask"])
        last = last_positions(batch["attention_mask"])
        found = theirs.score(hidden[torch.arange(8), last])[:, 0].tolist()
    assert found == pytest.approx(expected[:8], abs=1e-5)


def test_too_long_is_a_row_without_a_value_and_nothing_is_cut(reward_model_dir):
    model = load(reward_model_dir, max_length=60)
    found = dict(model.outcomes(enumerate([sample("Hi", "x" * 100), sample("Hi", "x")])))
    assert found[0]["error"].startswith("too long") and "at most 60" in found[0]["error"]
    assert "value" in found[1]


def test_plan_holds_weights_and_template(reward_model_dir, tmp_path):
    model = load(reward_model_dir)
    assert model.settings() == load(reward_model_dir, batch_tokens=7).settings()
    save_tiny_reward_model(tmp_path, seed=1)
    assert model.settings()["weights"] != load(tmp_path).settings()["weights"]
    assert model.warnings() == []


def causal_model(directory):
    from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model

    save_tiny_model(directory)
    save_char_tokenizer(directory)


def five_labels(directory):
    save_tiny_reward_model(directory, num_labels=5)


def a_nan(directory):
    save_tiny_reward_model(directory, edit=lambda model: model.score.weight[0, 3].fill_(float("nan")))


def no_template(directory):
    save_tiny_reward_model(directory, template=None)


def overflowing(directory):
    save_tiny_reward_model(directory, edit=lambda model: model.model.norm.weight.fill_(3e38))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (five_labels, "has 5 labels; a reward model has one"),
        (causal_model, "2 labels|lacks score.weight"),
        (a_nan, "NaN or infinity in score.weight"),
        (no_template, "no chat template; set rewards.rm.chat_template"),
    ],
)
def test_what_is_no_reward_model_is_one_line(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(UserError, match=words) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value) and "rewards.rm" in str(raised.value)


def test_a_head_that_is_missing_is_refused(tmp_path):
    import json

    causal_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_labels": 1, "id2label": {"0": "a"}}))
    with pytest.raises(UserError, match="lacks score.weight"):
        load(tmp_path)


def test_a_value_that_is_not_finite_stops_the_run(tmp_path):
    overflowing(tmp_path)
    with pytest.raises(UserError, match="gives (nan|-?inf)"):
        values(load(tmp_path), [sample("Hi", "x")])


def test_no_such_model(tmp_path):
    with pytest.raises(UserError, match="no readable model there"):
        load(tmp_path)
    with pytest.raises(UserError, match="sees no GPU|"):
        load(tmp_path, device="cuda")


def test_two_bos_are_refused_and_a_missing_one_is_said(tmp_path, reward_model_dir):
    shutil.copytree(reward_model_dir, tmp_path / "m")
    model = load(tmp_path / "m")
    model.conversation.tokenizer.bos_token = "<|im_start|>"
    template = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    model.conversation.tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="prints two BOS"):
        load(tmp_path / "m", chat_template=str(tmp_path / "t.jinja"))


def test_a_template_that_refuses_costs_the_row(tmp_path, reward_model_dir):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    (tmp_path / "t.jinja").write_text(template)
    model = load(reward_model_dir, chat_template=str(tmp_path / "t.jinja"))
    with pytest.raises(Unscorable, match="no system"):
        model.tokens((("system", "s"), ("user", "u")), "r")
