"""ArmoRM's head against a plain twin written here, on a tiny random body; the real 8B weights are not run."""

import json

import pytest
import torch
from making_helpers import sample
from safetensors.torch import load_file, save_file

from fuserl_megatron.config.score_sections import ModelReward
from fuserl_megatron.making.armorm import OBJECTIVES, TURN, last_place
from fuserl_megatron.making.reward_model import RewardModel
from fuserl_megatron.util.errors import UserError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<unk>", "\n\n", "\n"]
HIDDEN, TEMPERATURE = 32, 10


def save_tokenizer(directory, template=TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(SPECIAL + [chr(c) for c in range(32, 127)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[3],
        pad_token=SPECIAL[3],
        unk_token="<unk>",
        additional_special_tokens=[*SPECIAL[1:3], "\n\n"],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


def save_armorm(directory, drop=(), template=TEMPLATE):
    """A model with ArmoRM's names of weights and fields of the config."""
    from transformers import LlamaConfig, LlamaModel

    from fuserl_megatron.testing.tiny import LLAMA

    torch.manual_seed(0)
    fields = LLAMA | {"num_hidden_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": 4}
    body = LlamaModel(LlamaConfig(**fields | {"num_key_value_heads": 2}))
    body.save_pretrained(directory)
    weights = {f"model.{name}": 3 * value for name, value in load_file(directory / "model.safetensors").items()}
    sizes = [HIDDEN, 24, 24, 24, 19]
    head = {
        "regression_layer.weight": 0.1 * torch.randn(19, HIDDEN),
        "reward_transform_matrix": torch.eye(19) - 0.1 * torch.rand(19, 19),
        "gating.logit_scale": torch.tensor([1.5]),
    }
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        head[f"gating.layers.{i}.weight"] = 2 * torch.randn(outputs, inputs)
        head[f"gating.layers.{i}.bias"] = torch.randn(outputs)
    weights |= {name: value for name, value in head.items() if name not in drop}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["LlamaForRewardModelWithGating"], "num_labels": 1, "num_objectives": 19}
    config |= {"gating_temperature": TEMPERATURE, "gating_hidden_dim": 24, "gating_n_hidden": 3}
    config |= {"auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_custom.py").write_text("raise RuntimeError('code of the model was run')")
    save_tokenizer(directory, template)


def twin(directory, ids):
    """(score, objectives) of one row, step by step."""
    from transformers import LlamaConfig, LlamaModel

    weights = load_file(directory / "model.safetensors")
    body = LlamaModel(LlamaConfig.from_dict(json.loads((directory / "config.json").read_text()))).eval()
    body.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    with torch.no_grad():
        hidden = body(torch.tensor([ids])).last_hidden_state[0]
    pattern = [3, 1, *(SPECIAL.index("a") if "a" in SPECIAL else len(SPECIAL) + ord(c) - 32 for c in "assistant"), 2, 5]
    starts = [i for i in range(len(ids)) if ids[i : i + len(pattern)] == pattern]
    gate = hidden[starts[-1]]
    for i in range(4):
        gate = weights[f"gating.layers.{i}.weight"] @ gate + weights[f"gating.layers.{i}.bias"]
        gate = torch.relu(gate) if i < 3 else gate
    gate = torch.softmax(gate / TEMPERATURE, dim=0) * 1.5
    objectives = [float(hidden[-1] @ row) for row in weights["regression_layer.weight"]]
    score = 0.0
    for j in range(19):
        score += float(gate[j]) * sum(
            objectives[i] * float(weights["reward_transform_matrix"][i, j]) for i in range(19)
        )
    return score, objectives


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("armorm")
    save_armorm(directory)
    return directory


def load(directory, head="armorm"):
    return RewardModel("armorm", ModelReward(model=str(directory), head=head))


def test_score_and_objectives_are_the_twins_in_any_batch(directory):
    model = load(directory)
    samples = [sample("What is it?", "a" * n) for n in (1, 30, 7)]
    samples.append(
        sample(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
            + [{"role": "user", "content": "and now?"}],
            "the second turn counts",
        )
    )
    found = dict(model.outcomes(enumerate(samples)))
    for i, item in enumerate(samples):
        score, objectives = twin(directory, model.tokens(item.messages, item.response))
        assert found[i]["value"] == pytest.approx(score, abs=1e-5)
        assert list(found[i]["parts"]) == list(OBJECTIVES)
        assert list(found[i]["parts"].values()) == pytest.approx(objectives, abs=1e-5)
    assert len({round(outcome["value"], 3) for outcome in found.values()}) == 4


def test_the_gate_is_read_at_the_end_of_the_last_user_turn(directory):
    conversation = load(directory).conversation
    ids = conversation.ids(conversation.text((("user", "Hi"),), "Hello"))
    place = last_place(ids, conversation.ids(TURN))
    assert ids[place] == SPECIAL.index("<|eot_id|>") and ids[place + 1] == SPECIAL.index("<|start_header_id|>")


def test_what_is_not_armorm_is_refused(directory, tmp_path, reward_model_dir):
    with pytest.raises(UserError, match="set rewards.armorm.head=armorm"):
        load(directory, head="score")
    with pytest.raises(UserError, match="lacks gating.layers.0.weight and"):
        load(reward_model_dir)
    (tmp_path / "a").mkdir()
    save_armorm(tmp_path / "a", drop=("gating.layers.2.weight",))
    with pytest.raises(UserError, match=r"lacks gating.layers.2.weight"):
        load(tmp_path / "a")
    (tmp_path / "b").mkdir()
    save_armorm(tmp_path / "b", template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match="no turns of Llama 3's form"):
        load(tmp_path / "b")
