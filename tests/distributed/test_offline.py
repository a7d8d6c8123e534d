"""Offline conversion against core itself: what we write, core's own loader reads into a stock GPTModel at any layout;
what core writes at any layout, we read. Exactly, in both directions."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fusion_case import DPO, SFT, make_config, run
from plain_model import load_engine
from safetensors.torch import load_file, save_file

from fuserl_megatron.testing.tiny import LLAMA3_ROPE, save_char_tokenizer, save_tiny_model

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
MODELS = {
    "llama": dict(vocab_size=157, rope_parameters=LLAMA3_ROPE),
    "llama tied": dict(vocab_size=151, tie_word_embeddings=True, num_key_value_heads=2),
    "llama biases": dict(attention_bias=True, mlp_bias=True),
    "qwen2": dict(family="qwen2"),
    "qwen3": dict(family="qwen3", head_dim=16),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (Hugging Face directory, Megatron checkpoint made of it)."""
    from fuserl_megatron.convert.offline import hf_to_megatron

    made = {}
    for name, fields in MODELS.items():
        directory = tmp_path_factory.mktemp("models") / "hf"
        save_tiny_model(directory, **fields)
        save_char_tokenizer(directory)
        made[name] = (directory, hf_to_megatron(directory, directory.parent / "megatron"))
    return made


def same_weights(a, b):
    a, b = (load_file(Path(d) / "model.safetensors") for d in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def stock_model(directory, tp, pp):
    """GPTModel with core's own local layer spec and none of our parts, parameters set to NaN."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from fuserl_megatron.config.schema import ModelConfig, TrainerConfig
    from fuserl_megatron.convert.hf_config import read_config
    from fuserl_megatron.convert.layout import padded_vocab_size
    from fuserl_megatron.mcore import parallel
    from fuserl_megatron.mcore.model import transformer_config

    model = ModelConfig(path=directory, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    layout, shape = parallel.initialize(model, TrainerConfig()), read_config(directory)
    config = transformer_config(shape, model, layout, torch.float32, False)
    padded = padded_vocab_size(shape.vocab_size, tp, 128)
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_norm),
        vocab_size=padded,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=layout.pp_rank == 0,
        post_process=layout.is_last_stage,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
    )
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(torch.nan)
    return chunk, shape, layout, padded


def load_with_core(directory, folder, tp, pp):
    """Load at this layout with core's loader, no key missing on either side; compare with our own slices."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ps

    from fuserl_megatron.convert.shards import ShardReader, read_parameter
    from fuserl_megatron.mcore.weights import named_parameters

    chunk, shape, layout, padded = stock_model(directory, tp, pp)
    metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    state = {"model": chunk.sharded_state_dict(metadata=metadata)}
    state, missing, unexpected = dist_checkpointing.load(state, folder, strict="return_all")
    assert not missing and not unexpected
    chunk.load_state_dict(state["model"])
    compared = 0
    with ShardReader(directory) as reader:
        for name, parameter in named_parameters(SimpleNamespace(chunks=[chunk])):
            expected = read_parameter(reader, shape, name, tp, layout.tp_rank, padded_vocab=padded)
            assert torch.equal(parameter.detach(), expected), name
            compared += 1
    return compared, state["iteration"], state["checkpoint_version"], vars(state["args"])["num_layers"]


@pytest.mark.parametrize("tp,pp", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_core_loads_our_checkpoint_into_a_stock_model(ranks, models, name, tp, pp):
    directory, checkpoint = models[name]
    folder = checkpoint / "iter_0000000"
    for compared, iteration, version, layers in ranks.run(load_with_core, tp * pp, str(directory), str(folder), tp, pp):
        assert compared >= 12 and (iteration, version, layers) == (0, 3.0, 4)


def save_with_core(directory, folder, tp, pp, dtype):
    """Our training model, saved by core at this layout. Returns the keys it wrote."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ps

    (chunk,) = load_engine(directory, tp, pp, dtype=dtype).target.chunks
    metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    dist_checkpointing.save({"model": chunk.sharded_state_dict(metadata=metadata), "iteration": 7}, folder)


@pytest.mark.parametrize("tp,pp", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen3"])
def test_we_read_what_core_wrote(ranks, models, tmp_path, name, tp, pp):
    from fuserl_megatron.checkpoint.reader import DistReader
    from fuserl_megatron.convert.offline import megatron_to_hf

    directory, ours = models[name]
    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    ranks.run(save_with_core, tp * pp, str(directory), str(folder), tp, pp, torch.float32)
    megatron_to_hf(folder, tmp_path / "back", hf=directory)
    assert same_weights(directory, tmp_path / "back")
    with DistReader(folder) as theirs, DistReader(ours / "iter_0000000") as mine:
        assert {key: stored.dtype for key, stored in mine.keys.items()} == {k: s.dtype for k, s in theirs.keys.items()}
        assert all(
            mine.keys[k].size == theirs.keys[k].size for k in mine.keys if "embedding" not in k and "output" not in k
        )


def test_the_keys_carry_transformer_engines_fused_norm_names(models):
    from fuserl_megatron.checkpoint.reader import DistReader

    with DistReader(models["llama"][1] / "iter_0000000") as reader:
        assert reader.keys["decoder.layers.self_attention.linear_qkv.layer_norm_weight"].size == (4, 64)
        assert reader.keys["decoder.layers.mlp.linear_fc1.layer_norm_weight"].size == (4, 64)
        assert not any("input_layernorm" in key or "pre_mlp" in key for key in reader.keys)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_alone_is_exact_and_needs_nothing_else(models, tmp_path, name):
    from fuserl_megatron.convert.offline import megatron_to_hf

    directory, checkpoint = models[name]
    megatron_to_hf(checkpoint, tmp_path / "back", max_shard_bytes=30_000)
    shards = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(shards) > 1
    merged = {k: v for shard in shards for k, v in load_file(shard).items()}
    before = load_file(directory / "model.safetensors")
    assert before.keys() == merged.keys() and all(torch.equal(before[n], merged[n]) for n in before)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (directory / file).read_bytes()
    before, after = (json.loads((d / "config.json").read_text()) for d in (directory, tmp_path / "back"))
    assert before == after
    card = (tmp_path / "back" / "README.md").read_text()
    assert str(tmp_path.parent) not in card and f'base_model: "{directory.parent.name}-{directory.name}"' in card


def test_many_threads_and_tiny_windows_change_no_number(models, tmp_path, monkeypatch):
    from fuserl_megatron.convert import copying
    from fuserl_megatron.convert.offline import hf_to_megatron, megatron_to_hf

    directory, _ = models["llama"]
    monkeypatch.setattr(copying, "usable_cores", lambda: 8)
    monkeypatch.setattr(copying, "WINDOW_BYTES", 256)  # thousands of turns between the threads
    before = load_file(directory / "model.safetensors")
    for attempt in map(str, range(3)):
        hf_to_megatron(directory, tmp_path / attempt / "there")
        assert len(list((tmp_path / attempt / "there" / "iter_0000000").glob("*.distcp"))) == copying.MAX_THREADS
        megatron_to_hf(tmp_path / attempt / "there", tmp_path / attempt / "back", max_shard_bytes=30_000)
        shards = (tmp_path / attempt / "back").glob("model-*.safetensors")
        after = {k: v for shard in shards for k, v in load_file(shard).items()}
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_dtypes_change_on_request_and_mixed_files_lose_nothing(models, tmp_path):
    from fuserl_megatron.convert.offline import hf_to_megatron, megatron_to_hf

    directory, _ = models["llama"]
    hf_to_megatron(directory, tmp_path / "half", dtype="bfloat16")
    megatron_to_hf(tmp_path / "half", tmp_path / "back")
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "back"))
    assert all(torch.equal(before[n].bfloat16(), after[n]) for n in before)
    assert "bfloat16" in (tmp_path / "back" / "config.json").read_text()
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in directory.iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    save_file({n: t.bfloat16() if "mlp" in n else t for n, t in before.items()}, mixed / "model.safetensors")
    hf_to_megatron(mixed, tmp_path / "wide")
    megatron_to_hf(tmp_path / "wide", tmp_path / "wide_back")
    wide = load_file(tmp_path / "wide_back" / "model.safetensors")
    assert all(torch.equal(wide[n], before[n].bfloat16().float() if "mlp" in n else before[n]) for n in before)


@pytest.mark.parametrize(
    "objective,world,layout",
    [(SFT, 2, dict(tp=2)), (DPO, 2, dict(pp=2, precision="bf16")), (SFT, 2, dict(distopt=True))],
    ids=["tp2", "pp2 bf16", "dp2 distopt"],
)
def test_a_training_runs_checkpoint_gives_the_runs_export(ranks, case, tmp_path, objective, world, layout):
    from fuserl_megatron.convert.offline import megatron_to_hf

    config = make_config(
        case, objective, global_batch_size=3, max_steps=2, every=2, results_dir=str(tmp_path / "run"), **layout
    )
    assert ranks.run(run, world, config) == [0] * world
    megatron_to_hf(tmp_path / "run", tmp_path / "back")
    assert same_weights(tmp_path / "run" / "hf", tmp_path / "back")
    card = (tmp_path / "back" / "README.md").read_text()
    assert case["policy"] not in card and 'base_model: "policy"' in card and "iter_0000002" in card
