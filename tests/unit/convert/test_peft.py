"""A PEFT directory: the names and sizes of its factors, written as PEFT writes it, and what of others is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fuserl_megatron.config.adapter_section import TARGETS as NAMES
from fuserl_megatron.config.schema import AdapterConfig
from fuserl_megatron.convert import peft
from fuserl_megatron.convert.chat_files import ChatFormat
from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.util.errors import UserError

SHAPE = read_config(
    dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=40, hidden_size=16, intermediate_size=24)
    | dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6, hidden_act="silu")
    | dict(rms_norm_eps=1e-5, tie_word_embeddings=True)
)
LORA = AdapterConfig(kind="lora", rank=3, alpha=6.0)


def tensors(adapter=LORA):
    return {factor.name: torch.randn(factor.size) for factor in peft.all_factors(SHAPE, adapter)}


def write(tmp_path):
    (tmp_path / "base").mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_text("{}")
    chat, lineage = ChatFormat("{{ messages }}", 7), {"target": str(tmp_path / "base"), "name": "run"}
    peft.write_adapter(
        tmp_path / "adapter", tensors(), LORA, SHAPE, source_dir=tmp_path / "base", lineage=lineage, chat=chat
    )


@pytest.fixture
def directory(tmp_path):
    write(tmp_path)
    return tmp_path / "adapter"


def refused(directory, adapter=LORA):
    with pytest.raises(UserError) as caught:
        peft.AdapterReader(str(directory), SHAPE, adapter)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_targets_of_the_settings_are_those_of_the_name_table():
    assert tuple(peft.TARGETS) == NAMES
    assert {row.linear for row in peft.TARGETS.values()} == {
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    }


def test_names_sizes_and_tensor_parallel_parts():
    found = {factor.name: factor for factor in peft.all_factors(SHAPE, LORA)}
    assert len(found) == 2 * 7 * 2
    prefix = "base_model.model.model.layers.1."
    for name, size, part in (
        ("self_attn.k_proj.lora_A", (3, 16), (slice(0, 3), slice(0, 16))),
        ("self_attn.k_proj.lora_B", (12, 3), (slice(6, 12), slice(0, 3))),
        ("self_attn.o_proj.lora_A", (3, 24), (slice(0, 3), slice(12, 24))),
        ("self_attn.o_proj.lora_B", (16, 3), (slice(0, 16), slice(0, 3))),
        ("mlp.down_proj.lora_A", (3, 24), (slice(0, 3), slice(12, 24))),
    ):
        factor = found[f"{prefix}{name}.weight"]
        assert factor.size == size and factor.part(2, 1) == part
    cut, whole = peft.layer_parameters(SHAPE, LORA)
    assert 2 * (cut + whole) == sum(t.numel() for t in tensors().values()) == peft.num_parameters(SHAPE, LORA)
    assert peft.num_parameters(SHAPE, AdapterConfig()) == 0


def test_written_and_read_back(directory):
    stored = load_file(directory / peft.WEIGHTS)
    reader = peft.AdapterReader(str(directory), SHAPE, LORA)
    for factor in peft.all_factors(SHAPE, LORA):
        assert torch.equal(reader.read(factor), stored[factor.name])
    card = (directory / "README.md").read_text()
    assert str(directory.parent) not in card and 'library_name: "peft"' in card
    chat = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert {file.name for file in directory.iterdir()} == {"README.md", peft.CONFIG, peft.WEIGHTS, *chat}
    assert (directory / "chat_template.jinja").read_text() == "{{ messages }}"


def test_other_settings_are_named_with_what_to_type(directory):
    other = AdapterConfig(kind="lora", rank=4, alpha=5.0, use_rslora=True, targets=("q_proj",))
    message = refused(directory, other)
    assert "type adapter.rank=3 adapter.alpha=6.0 adapter.use_rslora=false adapter.targets=[" in message


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"peft_type": "IA3"}, "peft_type=IA3; only LORA"),
        ({"bias": "all"}, "bias=all; only bias=none"),
        ({"use_dora": True}, "use_dora=true; such an adapter is not trained here"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save=["lm_head"]'),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
    ],
)
def test_other_kinds_of_adapters_are_refused(directory, fields, says):
    file = directory / peft.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    assert says in refused(directory)


def test_an_adapter_of_another_model_is_refused(directory):
    file = directory / peft.WEIGHTS
    stored = load_file(file)
    name = next(iter(sorted(stored)))
    save_file({**stored, name: torch.zeros(5, 5)}, file)
    assert f"{name} is [5, 5], the model calls for" in refused(directory)
    save_file({n: t for n, t in stored.items() if n != name}, file)
    assert f"{name} is not there" in refused(directory)
    extra = name.replace("layers.0", "layers.7")
    save_file(stored | {extra: torch.zeros(2, 2)}, file)
    assert f"holds {extra}" in refused(directory)
    (directory / peft.CONFIG).unlink()
    assert "no such file" in refused(directory)
    assert "no such directory" in refused(directory / "nowhere")


def test_an_older_directory_stays_when_the_new_one_cannot_be_written(directory, monkeypatch):
    before = (directory / peft.WEIGHTS).read_bytes()
    monkeypatch.setattr(peft, "model_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(directory.parent)
    assert (directory / peft.WEIGHTS).read_bytes() == before
    assert len(list(directory.parent.glob("*adapter*partial*"))) == 0


def test_layers_that_lie_in_one_tensor_are_refused(make_config):
    shape = read_config(make_config("phi3"))
    with pytest.raises(UserError, match=r"phi3 model has no q_proj of its own.*adapter.targets=\[o_proj,down_proj\]"):
        peft.check_adapter(shape, LORA)
    peft.check_adapter(shape, AdapterConfig(kind="lora", targets=("o_proj", "down_proj")))
    peft.check_adapter(shape, AdapterConfig())
    peft.check_adapter(read_config(make_config("gemma2")), LORA)
