"""Exported directories: complete, exact, opened by transformers; or not there at all."""

import errno
import json
import os
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.convert.hf_io import (
    begin_export,
    check_model_directory,
    config_with_dtype,
    export_directory,
    finish_export,
)
from fuserl_megatron.convert.layout import hf_tensors_from_megatron
from fuserl_megatron.convert.names import hf_shapes, megatron_names
from fuserl_megatron.convert.shard_writer import ShardWriter
from fuserl_megatron.convert.shards import ShardReader, check_tensors, read_parameter
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.whole_directory import discard

LINEAGE = {"target": "tiny", "sources": ["a", "b"], "data manifest": "sha256:0", "config": {"stage": "fusesft"}}


def through_megatron(directory):
    """The model's tensors, read into Megatron's layout and turned back."""
    shape = read_config(directory)
    with ShardReader(directory) as reader:
        for name in megatron_names(shape):
            yield from hf_tensors_from_megatron(name, read_parameter(reader, shape, name, padded_vocab=64), shape)


def export(source, destination, tensors=None, **options):
    options = {"dtype": torch.float32, "lineage": LINEAGE, "source_dir": source} | options
    tensors = through_megatron(source) if tensors is None else tensors
    with export_directory(destination, config_dict=read_config(source).raw, **options) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)


def left_over(directory):
    """Everything in a directory, hidden files too."""
    return sorted(os.listdir(directory))


@pytest.fixture
def source(tmp_path, make_config, write_model):
    write_model(tmp_path / "source", make_config(), shards=3)
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}),
        ("mistral", {"num_key_value_heads": 1}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_a_round_trip_is_exact_and_transformers_opens_it(tmp_path, make_config, write_model, family, changes):
    config = make_config(family, **changes)
    write_model(tmp_path / "in", config)
    shape = read_config(config)
    export(tmp_path / "in", tmp_path / "out", dtype=shape.dtype, max_shard_bytes=20_000)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / place, dtype="auto") for place in ("in", "out")]
    expected, actual = (model.state_dict() for model in models)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)


def test_every_field_and_companion_file_travels(tmp_path, make_config, write_model):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    config = make_config(rope_scaling=rope, some_field_of_a_later_version={"kept": [1, None]}, eos_token_id=[1, 2])
    write_model(tmp_path / "in", config)
    (tmp_path / "in" / "additional_chat_templates").mkdir()
    (tmp_path / "in" / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (tmp_path / "in" / "LICENSE.txt").write_text("terms")
    export(tmp_path / "in", tmp_path / "out", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"torch_dtype": "bfloat16"}
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "additional_chat_templates/rag.jinja",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert left_over(tmp_path / "out") == sorted({*os.listdir(tmp_path / "in"), "README.md"})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "sha256:0" in card and '"stage": "fusesft"' in card and "megatron-core" in card
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "in").stat().st_mode


def test_dtype_goes_where_the_config_keeps_it():
    assert config_with_dtype({"dtype": "float32", "a": 1}, torch.bfloat16) == {"dtype": "bfloat16", "a": 1}
    assert config_with_dtype({"a": 1}, torch.float16) == {"a": 1, "torch_dtype": "float16"}
    with pytest.raises(UserError, match="int8"):
        config_with_dtype({}, torch.int8)


def failing(source, after, error):
    for i, item in enumerate(through_megatron(source)):
        if i == after:
            raise error
        yield item


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), OSError(errno.EIO, "input/output error")])
@pytest.mark.parametrize("after", [0, 9])
def test_an_interrupted_export_leaves_nothing(tmp_path, source, after, error):
    with pytest.raises(type(error)):
        export(source, tmp_path / "out", failing(source, after, error))
    assert left_over(tmp_path) == ["source"]


def test_an_interrupted_replacement_leaves_the_old_model(tmp_path, source):
    export(source, tmp_path / "out")
    before = {file: (tmp_path / "out" / file).read_bytes() for file in left_over(tmp_path / "out")}
    with pytest.raises(UserError, match="--force"):
        export(source, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "out", failing(source, 5, KeyboardInterrupt()), force=True)
    assert {file: (tmp_path / "out" / file).read_bytes() for file in left_over(tmp_path / "out")} == before
    export(source, tmp_path / "out", dtype=torch.bfloat16, force=True)
    assert read_config(tmp_path / "out").dtype == torch.bfloat16
    assert left_over(tmp_path) == ["out", "source"]


def test_a_failed_rename_puts_the_old_model_back(tmp_path, source, monkeypatch):
    export(source, tmp_path / "out")
    rename = os.rename

    def refuse(old, new):
        if ".partial-" in str(old):
            raise OSError(errno.EACCES, "Permission denied")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        export(source, tmp_path / "out", dtype=torch.bfloat16, force=True)
    assert read_config(tmp_path / "out").dtype == torch.float32
    assert left_over(tmp_path) == ["out", "source"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t[:-1], "lm_head.weight was never written"),
        (lambda t: [x for x in t if "layers.1." not in x[0]], r"model.layers.1.*\(9 missing\)"),
        (lambda t: [*t, ("model.layers.2.norm", torch.ones(1))], "model.layers.2.norm: not among"),
        (lambda t: [*t, t[0]], "written twice"),
        (lambda t: [(t[0][0], torch.ones(64, 48)), *t[1:]], "shape"),  # padded rows leak
    ],
)
def test_an_incomplete_or_wrong_stream_is_never_published(tmp_path, source, spoil, said):
    tensors = list(through_megatron(source))
    with pytest.raises(UserError, match=said):
        export(source, tmp_path / "out", spoil(tensors))
    assert left_over(tmp_path) == ["source"]


def test_several_processes_share_one_export(tmp_path, source):
    shape = read_config(source)
    options = {"config_dict": shape.raw, "source_dir": source, "dtype": torch.float32, "max_shard_bytes": 20_000}
    partial = begin_export(tmp_path / "out", **options)
    names, tensors = set(), list(through_megatron(source))
    for stage in range(2):
        with ShardWriter(partial, hf_shapes(shape), torch.float32, 20_000, create=False) as writer:
            for name, tensor in tensors[stage::2]:
                writer.write(name, tensor)
        if stage == 0:
            with pytest.raises(UserError, match="never written"):
                finish_export(partial, tmp_path / "out", written=writer.written, lineage=LINEAGE)
        names |= writer.written
    assert not (tmp_path / "out").exists()
    finish_export(partial, tmp_path / "out", written=names, lineage=LINEAGE)
    with ShardReader(tmp_path / "out") as reader:
        check_tensors(reader, shape)
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors)
    discard(partial)  # harmless now
    assert left_over(tmp_path) == ["out", "source"]


def test_destinations_that_cannot_be(tmp_path, source):
    (tmp_path / "file").write_text("")
    for destination, said in (
        (tmp_path / "file", "a file is in the way"),
        (tmp_path / "file" / "below", "cannot be created"),
        (source, "would remove the model"),
        (tmp_path, "would remove the model"),
    ):
        with pytest.raises(UserError, match=said):
            export(source, destination, force=True)
    assert left_over(tmp_path) == ["file", "source"]


def test_a_source_without_tokenizer_is_refused_unless_asked(tmp_path, source):
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        export(source, tmp_path / "out")
    with pytest.raises(UserError, match="no source to copy the tokenizer from"):
        export(source, tmp_path / "out", source_dir=None)
    export(source, tmp_path / "out", require_tokenizer=False)
    assert check_model_directory(tmp_path / "out") == tmp_path / "out"


def test_too_little_space_is_known_before_anything_is_written(tmp_path, source, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(UserError, match="free; free space"):
        export(source, tmp_path / "out")
    assert left_over(tmp_path) == ["source"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB; only root can make one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mount.returncode:
        pytest.skip("needs root to mount a small tmpfs")
    yield place
    subprocess.run(["mount", "-o", "remount,rw", str(place)], check=False)
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, small_disk, make_config, write_model):
    write_model(tmp_path / "big", make_config(vocab_size=4000))
    with pytest.raises(UserError, match="free; free space"):
        export(tmp_path / "big", small_disk / "out", dtype=torch.float64)
    assert left_over(small_disk) == []


def test_a_disk_that_fills_up_underway_is_one_line_and_leaves_nothing(tmp_path, small_disk, source):
    def filling():
        (small_disk / "other").write_bytes(b"")
        for i, item in enumerate(through_megatron(source)):
            if i == 3:
                with open(small_disk / "other", "wb", buffering=0) as other, pytest.raises(OSError):
                    while True:
                        other.write(bytes(4096))
            yield item

    with pytest.raises(UserError, match="disk is full") as caught:
        export(source, small_disk / "out", filling())
    assert "\n" not in str(caught.value) and left_over(small_disk) == ["other"]


def test_a_read_only_destination_is_one_line(small_disk, source):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="cannot be created .Read-only"):
        export(source, small_disk / "out")


def test_paths_that_are_not_models(tmp_path, source):
    (tmp_path / "checkpoint" / "iter_0000010").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    for path, said in (
        (tmp_path / "nowhere", "no such directory"),
        (source / "config.json", "a file"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "checkpoint", "Megatron checkpoint"),
        (tmp_path / "bare", "model.safetensors"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            check_model_directory(path)
        assert "\n" not in str(caught.value)
    assert check_model_directory(source) == source
