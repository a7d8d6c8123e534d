"""Export by all ranks at once: the same bytes as from one process at every layout, a bounded memory, and on a failure
of any rank one line on all of them and nothing left."""

import os
import resource
from pathlib import Path

import pytest
from plain_model import load_engine

from fuserl_megatron.testing.tiny import LLAMA3_ROPE, save_char_tokenizer, save_tiny_model

SHARD_BYTES = 100_000
MIB = 2**20
LAYOUTS = {  # ranks, TP, PP, virtual stages
    "tp1": (1, 1, 1, None),
    "tp2": (2, 2, 1, None),
    "pp2": (2, 1, 2, None),
    "dp2": (2, 1, 1, None),
    "tp2 pp2": (4, 2, 2, None),
    "tp2 dp2": (4, 2, 1, None),
    "pp2 vpp2 dp2": (4, 1, 2, 2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Untied and tied -> (the model, what one process exports)."""
    import torch

    from fuserl_megatron.convert.hf_config import read_config
    from fuserl_megatron.convert.hf_io import export_directory
    from fuserl_megatron.convert.names import hf_shapes
    from fuserl_megatron.convert.shards import ShardReader

    made = {}
    for tied in (False, True):
        source = tmp_path_factory.mktemp("model") / "source"
        save_tiny_model(source, vocab_size=157, tie_word_embeddings=tied, rope_parameters=LLAMA3_ROPE)
        save_char_tokenizer(source)
        options = dict(source_dir=source, dtype=torch.float32, max_shard_bytes=SHARD_BYTES, lineage={"target": "tiny"})
        with (
            ShardReader(source) as reader,
            export_directory(source.parent / "alone", config_dict=read_config(source).raw, **options) as writer,
        ):
            for name in hf_shapes(read_config(source)):
                writer.write(name, reader.read(name))
        made[tied] = (source, source.parent / "alone")
    return made


def export(source, destination, tp, pp, vpp, file_limits=()):
    """Load, export. The bytes this rank handed to the kernel, and the error's text or None."""
    from fuserl_megatron.mcore import weights
    from fuserl_megatron.util.errors import UserError

    engine = load_engine(source, tp, pp, vpp)
    before, limit = written_so_far(), resource.getrlimit(resource.RLIMIT_FSIZE)
    if engine.layout.rank in file_limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    error = None
    try:
        options = dict(source_dir=source, lineage={"target": "tiny"}, max_shard_bytes=SHARD_BYTES)
        weights.export_hf(engine.target, engine.layout, destination, **options)
    except UserError as raised:
        error = str(raised)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return written_so_far() - before, error


def written_so_far():
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def content(directory):
    return {file.name: file.read_bytes() for file in Path(directory).iterdir()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_writes_and_the_bytes_are_those_of_one_process(ranks, models, tmp_path, layout, tied):
    source, alone = models[tied]
    world, *sizes = LAYOUTS[layout]
    expected = content(alone)
    results = ranks.run(export, world, str(source), str(tmp_path / "hf"), *sizes)
    assert [error for _, error in results] == [None] * world
    actual = content(tmp_path / "hf")
    for card in (expected, actual):
        assert card.pop("README.md")
    assert len(expected) > 8 and actual == expected
    total = sum(len(part) for name, part in expected.items() if name.endswith(".safetensors"))
    assert all(written > total / world / 4 for written, _ in results)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("failing", [0, 3])
def test_a_rank_that_cannot_write_stops_all_and_leaves_the_older_model(ranks, models, tmp_path, failing):
    """The kernel refuses one rank every byte past 20 kB of a file."""
    source, _ = models[False]
    old = tmp_path / "hf"
    old.mkdir()
    (old / "older").write_text("x")
    results = ranks.run(export, 4, str(source), str(old), 2, 2, None, (failing,))
    (error,) = {error for _, error in results}
    assert "cannot be " in error and "File too large" in error and "\n" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["hf"] and [p.name for p in old.iterdir()] == ["older"]
    results = ranks.run(export, 4, str(source), str(old), 2, 2, None)
    assert {error for _, error in results} == {None} and not (old / "older").exists()


def peak_of_export(source, destination, everything_first):
    """MiB by which the peak of this rank's memory exceeds what it held before the export."""
    from fuserl_megatron.mcore import weights

    engine = load_engine(source, tp=2)
    target, layout = engine.target, engine.layout
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    status = Path("/proc/self/status").read_text
    before = int(status().split("VmRSS:")[1].split()[0])
    if everything_first:
        tensors = [(name, tensor.clone()) for name, tensor in weights.gather_hf_tensors(target, layout)]
        del tensors
    weights.export_hf(target, layout, destination, source_dir=source, lineage={})
    return (int(status().split("VmHWM:")[1].split()[0]) - before) / 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc/self/clear_refs")
def test_memory_is_that_of_a_few_tensors(ranks, tmp_path):
    source = tmp_path / "source"
    save_tiny_model(source, num_hidden_layers=16, hidden_size=512, intermediate_size=1024)  # 8 MiB a layer, fc1 4 MiB
    save_char_tokenizer(source)
    whole = (source / "model.safetensors").stat().st_size / MIB
    streamed = ranks.run(peak_of_export, 2, str(source), str(tmp_path / "hf"), False)
    gathered = ranks.run(peak_of_export, 2, str(source), str(tmp_path / "hf"), True)
    assert whole > 100 and max(streamed) < 0.5 * whole and gathered[0] > 0.9 * whole, (whole, streamed, gathered)
