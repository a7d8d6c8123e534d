"""Reading and writing weight files: slices, streaming, and every way a directory can be wrong."""

import json
import os
import resource
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensor_parallel import shard

from fuserl_megatron.convert import shard_writer
from fuserl_megatron.convert import shards as shards_module
from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.convert.layout import hf_tensors_from_megatron, unshard
from fuserl_megatron.convert.names import megatron_names, te_name
from fuserl_megatron.convert.shard_writer import ShardWriter
from fuserl_megatron.convert.shards import ShardReader, check_tensors, read_parameter
from fuserl_megatron.util.errors import UserError

CASES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 8, "torch_dtype": "bfloat16"}),
    ("mistral", {"head_dim": 16, "torch_dtype": "float16"}),
    ("qwen2", {}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "torch_dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("family", "changes"), CASES)
@pytest.mark.parametrize("shards", [1, 5])
def test_ranks_read_exactly_their_slices_and_together_the_whole(
    tmp_path, make_config, write_model, family, changes, shards
):
    config = make_config(family, **changes)
    weights = write_model(tmp_path, config, shards=shards)
    shape = read_config(tmp_path)
    returned = {}
    with ShardReader(tmp_path) as reader:
        check_tensors(reader, shape)
        for name in megatron_names(shape):
            full = read_parameter(reader, shape, name, padded_vocab=64)
            for tp in (1, 2, 4):
                parts = [read_parameter(reader, shape, te_name(name), tp, r, padded_vocab=64) for r in range(tp)]
                assert all(torch.equal(shard(full, name, tp, r), part) for r, part in enumerate(parts)), (name, tp)
                assert torch.equal(unshard(parts, name), full)
                assert all(part.is_contiguous() for part in parts)
            returned |= dict(hf_tensors_from_megatron(name, full, shape))
    assert returned.keys() == weights.keys()
    for name, expected in weights.items():
        assert returned[name].dtype == expected.dtype and torch.equal(returned[name], expected), name


def test_multi_query_attention_at_one_rank(tmp_path, make_config, write_model):
    weights = write_model(tmp_path, make_config(num_key_value_heads=1))
    shape, name = read_config(tmp_path), "decoder.layers.1.self_attention.linear_qkv.weight"
    with ShardReader(tmp_path) as reader:
        actual = read_parameter(reader, shape, name)
        with pytest.raises(UserError, match="1 does not divide"):
            read_parameter(reader, shape, name, 2, 0)
    layer = "model.layers.1.self_attn.{}_proj.weight"
    assert torch.equal(actual, torch.cat([weights[layer.format(x)] for x in "qkv"]))


def test_only_the_bytes_of_the_slice_are_read(tmp_path, make_config, write_model, monkeypatch):
    write_model(tmp_path, make_config())
    shape, read, preadv = read_config(tmp_path), [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read.append(preadv(fd, views, at)) or read[-1])
    with ShardReader(tmp_path) as reader:
        for name in ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"):
            read.clear()
            part = read_parameter(reader, shape, f"decoder.layers.0.{name}", 4, 3)
            assert sum(read) == part.nbytes


def test_the_padding_may_fall_wholly_on_one_rank(tmp_path, make_config, write_model):
    weights = write_model(tmp_path, make_config(vocab_size=5))
    shape = read_config(tmp_path)
    with ShardReader(tmp_path) as reader:
        parts = [read_parameter(reader, shape, "output_layer.weight", 4, r, padded_vocab=16) for r in range(4)]
        assert torch.equal(torch.cat(parts)[:5], weights["lm_head.weight"]) and not torch.cat(parts)[5:].any()
        with pytest.raises(UserError, match="padded vocabulary 18"):
            read_parameter(reader, shape, "output_layer.weight", 4, 0, padded_vocab=18)
        tied = read_config(make_config(vocab_size=5, tie_word_embeddings=True))
        copy = read_parameter(reader, tied, "output_layer.weight", 1, 0)
        assert torch.equal(copy, weights["model.embed_tokens.weight"])


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def edit_index(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


SECOND = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: (d / SECOND).unlink(), SECOND + ": no such file"),
        (lambda d: cut(d / SECOND, -10), SECOND + ".*truncated"),
        (lambda d: cut(d / SECOND, 40), SECOND + ": truncated"),
        (lambda d: cut(d / SECOND, 3), SECOND + ": truncated"),
        (lambda d: (d / SECOND).write_bytes(b""), SECOND + ": truncated"),
        (lambda d: (d / SECOND).write_bytes(struct.pack("<Q", 8) + b"not json"), SECOND + ": not a safetensors file"),
        (lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes() + b"more"), SECOND + ".*promises"),
        (
            lambda d: edit_index(d, lambda m: m.pop("model.norm.weight")),
            "holds model.norm.weight but the index does not",
        ),
        (lambda d: edit_index(d, lambda m: m.update(ghost=SECOND)), SECOND + ": lacks ghost"),
        (lambda d: edit_index(d, lambda m: m.update({"model.norm.weight": SECOND})), "the index puts it in"),
        (lambda d: edit_index(d, lambda m: m.update(x="../elsewhere.safetensors")), "only plain file names"),
        (lambda d: save_file({"x": torch.ones(1)}, d / "model-00004-of-00004.safetensors"), "does not name"),
        (lambda d: save_file({"x": torch.ones(1)}, d / "model.safetensors"), "holds both"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "not a weight index"),
        (lambda d: [f.unlink() for f in d.glob("model*")], "neither"),
    ],
)
def test_damaged_directories_are_one_line_naming_the_file(tmp_path, make_config, write_model, damage, named):
    write_model(tmp_path, make_config(), shards=3)
    damage(tmp_path)
    with pytest.raises(UserError, match=named) as caught:
        ShardReader(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 3}, "no weight file holds model.layers.2"),
        ({"num_hidden_layers": 1}, "holds model.layers.1"),
        ({"vocab_size": 54}, r"embed_tokens.weight has shape \[53, 48\], but config.json says \[54, 48\]"),
        ({"num_key_value_heads": 8}, "k_proj.weight has shape"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from the embedding"),
        ({"attention_bias": True}, "q_proj.bias"),
    ],
)
def test_a_config_that_lies_about_the_weights_is_caught(tmp_path, make_config, write_model, changes, named):
    write_model(tmp_path, make_config(), shards=2)
    with ShardReader(tmp_path) as reader, pytest.raises(UserError, match=named) as caught:
        check_tensors(reader, read_config(make_config(**changes)))
    assert "\n" not in str(caught.value)


def test_reading_past_a_lying_config_never_gives_wrong_numbers(tmp_path, make_config, write_model):
    write_model(tmp_path, make_config())
    with ShardReader(tmp_path) as reader:
        for changes in ({"vocab_size": 60}, {"intermediate_size": 80}, {"hidden_size": 50}):
            shape = read_config(make_config(**changes))
            with pytest.raises(UserError, match="another model|disagree"):
                for name in megatron_names(shape):
                    read_parameter(reader, shape, name)


def test_harmless_extras_are_let_through(tmp_path, make_config, make_weights, write_model):
    config = make_config(tie_word_embeddings=True)
    weights = make_weights(config)
    extras = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    extras["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    write_model(tmp_path, config, weights | extras)
    with ShardReader(tmp_path) as reader:
        check_tensors(reader, read_config(tmp_path))


def test_integer_weights_are_refused(tmp_path, make_config, make_weights, write_model):
    weights = make_weights(make_config())
    weights["model.norm.weight"] = torch.ones(48, dtype=torch.int32)
    write_model(tmp_path, make_config(), weights)
    with ShardReader(tmp_path) as reader, pytest.raises(UserError, match="int32"):
        check_tensors(reader, read_config(tmp_path))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_need_leave_and_are_loaded_weights_only(tmp_path, make_config, make_weights, sharded, zipped):
    config = make_config()
    weights = make_weights(config)
    names = list(weights)
    parts = [names[:7], names[7:]] if sharded else [names]
    files = [f"pytorch_model-{i}.bin" if sharded else "pytorch_model.bin" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        torch.save({n: weights[n] for n in part}, tmp_path / file, _use_new_zipfile_serialization=zipped)
    if sharded:
        index = {"weight_map": {name: file for file, part in zip(files, parts, strict=True) for name in part}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="allow-pickle"):
        ShardReader(tmp_path)
    shape = read_config(config)
    with ShardReader(tmp_path, allow_pickle=True) as reader:
        check_tensors(reader, shape)
        for name in megatron_names(shape):
            full = read_parameter(reader, shape, name)
            for hf, tensor in hf_tensors_from_megatron(name, full, shape):
                assert torch.equal(tensor, weights[hf])


@pytest.mark.parametrize(
    "content", [{"state_dict": {}}, {3: torch.ones(2)}, {"a": torch.eye(2).to_sparse()}, [torch.ones(2)]]
)
def test_a_pickle_of_anything_but_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="more than named, dense tensors"):
        ShardReader(tmp_path, allow_pickle=True)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"x": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not loadable as plain weights"):
        ShardReader(tmp_path, allow_pickle=True)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("max_shard_bytes", [10**9, 5000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_files_are_read_by_the_safetensors_library(tmp_path, make_config, make_weights, max_shard_bytes, dtype):
    weights = make_weights(make_config()) | {
        "odd": torch.ones(3),
        "scalar": torch.tensor(2.5),
        "empty": torch.ones(0, 4),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    first = ShardWriter(tmp_path, shapes, dtype, max_shard_bytes)
    second = ShardWriter(tmp_path, shapes, dtype, max_shard_bytes, create=False)
    for i, name in enumerate(sorted(weights, reverse=True)):  # any order, two writers at once
        (first, second)[i % 2].write(name, weights[name])
    assert first.close() | second.close() == weights.keys()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (max_shard_bytes == 10**9) == (not (tmp_path / "model.safetensors.index.json").exists())
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor.to(dtype)), name
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [weights[name].numel() * dtype.itemsize for name in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= max_shard_bytes or len([size for size in sizes if size]) == 1
    with ShardReader(tmp_path) as reader:
        assert torch.equal(reader.read("scalar"), torch.tensor(2.5, dtype=dtype))


def test_tensors_larger_than_the_window(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "WINDOW_BYTES", 1000)
    monkeypatch.setattr(shards_module, "WINDOW_BYTES", 1000)
    pwrite, preadv = os.pwrite, os.preadv  # a file system may take or give less than it is asked for
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:300], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:300]], at))
    weights = {"matrix": torch.randn(37, 50), "wide": torch.randn(3, 2000), "vector": torch.randn(4001)}
    with ShardWriter(tmp_path, {n: tuple(t.shape) for n, t in weights.items()}, torch.bfloat16) as writer:
        for name, tensor in weights.items():
            writer.write(name, tensor)
    loaded = load_file(tmp_path / "model.safetensors")
    with ShardReader(tmp_path) as reader:
        for name, tensor in weights.items():
            assert torch.equal(loaded[name], tensor.bfloat16())
            assert torch.equal(reader.read(name), loaded[name])
        assert torch.equal(reader.read("matrix", 1, 7, 31), loaded["matrix"][:, 7:31])
        assert torch.equal(reader.read("wide", 1, 1999, 2000), loaded["wide"][:, 1999:])
        assert torch.equal(reader.read("matrix", 0, 36, 37), loaded["matrix"][36:])
        assert reader.read("matrix", 0, 5, 5).shape == (0, 50)


@pytest.mark.parametrize("places", [[[0, 4], [0, 4]], [[0, 4], [8, 12]], [[4, 8], [0, 4]], [[0, 4], [4, 12]]])
def test_headers_with_gaps_or_overlaps_are_refused(tmp_path, places):
    entries = {n: {"dtype": "F32", "shape": [1], "data_offsets": p} for n, p in zip("ab", places, strict=True)}
    header = json.dumps(entries).encode()
    end = max(place[1] for place in places)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(end))
    if places == [[4, 8], [0, 4]]:  # another order without gaps is fine
        assert ShardReader(tmp_path).tensors.keys() == {"a", "b"}
        return
    with pytest.raises(UserError, match="not those of its shape"):
        ShardReader(tmp_path)


def test_a_file_cut_while_it_is_read_is_an_error_not_a_crash(tmp_path, make_config, write_model):
    write_model(tmp_path, make_config())
    with ShardReader(tmp_path) as reader:
        cut(tmp_path / "model.safetensors", 5000)
        with pytest.raises(UserError, match="cut short"):
            for name in reader.tensors:
                reader.read(name)


def test_wrong_writes_are_refused(tmp_path):
    with ShardWriter(tmp_path, {"a": (2, 3), "b": (2,)}, torch.float16) as writer:
        with pytest.raises(UserError, match="c: not among"):
            writer.write("c", torch.ones(1))
        with pytest.raises(UserError, match=r"a: shape \[3, 2\]"):
            writer.write("a", torch.ones(3, 2))
        for beside in (0.0, torch.inf):  # what is infinite already hides nothing
            with pytest.raises(UserError, match="float16's range"):
                writer.write("b", torch.tensor([1e6, beside]))
        writer.write("a", torch.ones(3, 2).T)  # not contiguous
        with pytest.raises(UserError, match="a: written twice"):
            writer.write("a", torch.ones(2, 3))
        assert writer.written == {"a"}


def test_rows_in_any_order_make_the_tensor_and_too_many_are_refused(tmp_path):
    with ShardWriter(tmp_path, {"a": (5, 3), "b": (4,)}, torch.bfloat16) as writer:
        a, b = torch.randn(5, 3), torch.randn(4)
        writer.write_rows("a", 3, a[3:])
        writer.write_rows("b", 0, b)
        assert writer.written == {"b"}
        writer.write_rows("a", 0, a[:3])
        assert writer.written == {"a", "b"}
        for name, first, rows in (("a", 0, a[:1]), ("b", 3, b[:2]), ("c", 0, b), ("b", 0, a[:1])):
            with pytest.raises(UserError, match="not missing"):
                writer.write_rows(name, first, rows)
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written["a"], a.bfloat16()) and torch.equal(written["b"], b.bfloat16())


def test_memory_stays_at_one_tensor_however_large_the_model(tmp_path):
    # 60 tensors of 4 MiB: 240 MiB pass through; the peak may grow by a few tensors and windows only.
    shapes = {f"t{i}": (1024, 1024) for i in range(60)}
    tensor = torch.ones(1024, 1024)
    with ShardWriter(tmp_path, {"warm": (1024, 1024)}, torch.float32) as writer:
        writer.write("warm", tensor)
    (tmp_path / "model.safetensors").unlink()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ShardWriter(tmp_path, shapes, torch.float32, 64 * 2**20) as writer:
        for name in shapes:
            writer.write(name, tensor)
    with ShardReader(tmp_path) as reader:
        for name in shapes:
            reader.read(name)
            reader.read(name, 1, 0, 512)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 64, f"peak memory grew by {grown:.0f} MiB"
