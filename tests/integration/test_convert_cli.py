"""`fuserl convert`, `fuserl verify` and the batch tools as a user starts them: the way there and back, planted faults
that `verify` must see, and bad input: one clear line, the exit code, nothing half-written."""

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fuserl_megatron import cli
from fuserl_megatron.testing.tiny import LLAMA3_ROPE, save_char_tokenizer, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 157


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "FUSERL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as `fuserl verify` sets it, and put back afterwards


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face directory, and its Megatron checkpoint."""
    directory = tmp_path_factory.mktemp("models") / "hf"
    save_tiny_model(directory, vocab_size=VOCAB, rope_parameters=LLAMA3_ROPE)
    save_char_tokenizer(directory)
    assert cli.main(["convert", "hf-to-megatron", str(directory), str(directory.parent / "megatron")]) == 0
    return directory, directory.parent / "megatron"


def copy_of(directory, destination):
    shutil.copytree(directory, destination)
    return destination


def leftovers(directory):
    """Everything in a directory, hidden names too, but the files the test put there."""
    return sorted(p.name for p in directory.iterdir())


def error_line(capsys, *arguments):
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fuserl: error: ") and err.count("\n") == 1
    return err


def run_python(*arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_there_and_back_through_the_tools(model, tmp_path):
    directory, _ = model
    for tool, source, destination in (
        ("convert_hf_to_megatron.py", directory, tmp_path / "m"),
        ("convert_megatron_to_hf.py", tmp_path / "m", tmp_path / "b"),
    ):
        done = run_python(ROOT / "tools" / tool, source, destination, "--report", tmp_path / "report.json")
        out, err = done.communicate(timeout=600)
        assert done.returncode == 0, err
        report = json.loads(out)
        assert report == json.loads((tmp_path / "report.json").read_text())
        assert report["bytes"] > 4e5 and report["peak_resident_bytes"] > 1e7
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "b"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    done = run_python(ROOT / "tools" / "convert_megatron_to_hf.py", directory, tmp_path / "c")
    _, err = done.communicate(timeout=600)
    assert done.returncode == 2 and err.count("\n") == 1 and "not a Megatron checkpoint" in err


# --- verify ---


def verify(tmp_path, a, b, *options):
    from fuserl_megatron.proofs.verify import verify as run

    report = tmp_path / "report.json"
    code = run(a, b, json_path=report, max_new_tokens=8, **dict(options))
    return code, json.loads(report.read_text())


@pytest.mark.parametrize("sides", ["hf hf", "hf megatron", "megatron hf", "megatron megatron"])
def test_equal_models_are_the_same(model, tmp_path, sides, capsys):
    paths = dict(zip(("hf", "megatron"), model, strict=True))
    code, report = verify(tmp_path, *(paths[side] for side in sides.split()))
    assert code == 0 and report["same"] and report["tensors"]["compared"] == 39
    assert report["log_probabilities"]["tokens"] > 300 and report["greedy"]["identical"] == report["greedy"]["prompts"]
    assert abs(report["log_probabilities"]["mean"][0]) > 1
    assert "DIFFERENT" not in capsys.readouterr().out


def change_hf(directory, change):
    """Rewrite a directory's weights and config by `change(tensors, config)`."""
    tensors, config = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    change(tensors, config)
    save_file(
        {n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors", metadata={"format": "pt"}
    )
    (directory / "config.json").write_text(json.dumps(config))


def swapped_gate_up(tensors, config):
    name = "model.layers.1.mlp.{}_proj.weight".format
    tensors[name("gate")], tensors[name("up")] = tensors[name("up")], tensors[name("gate")]


def unmixed_qkv(tensors, config):
    """What a converter that does not interleave by group gives back: rows of [q; k; v] taken for groups."""
    from fuserl_megatron.convert.hf_config import read_config
    from fuserl_megatron.convert.layout import split_qkv

    names = [f"model.layers.2.self_attn.{x}_proj.weight" for x in "qkv"]
    parts = split_qkv(torch.cat([tensors[n] for n in names]), read_config(config))
    tensors.update(zip(names, parts, strict=True))


def rope_field(tensors, config):
    config["rope_parameters"]["factor"] = 4.0


def rope_field_without_effect_here(tensors, config):
    """No wavelength of so few dimensions lies between the bounds: only the config can tell."""
    config["rope_parameters"]["low_freq_factor"] = 1.5


def missing_layer(tensors, config):
    for name in [n for n in tensors if n.startswith("model.layers.3.")]:
        del tensors[name]


def missing_layer_and_config(tensors, config):
    missing_layer(tensors, config)
    config["num_hidden_layers"] = 3


def norm_weight(tensors, config):
    tensors["model.layers.0.post_attention_layernorm.weight"][5] += 1e-3


def leaked_padding(tensors, config):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat((tensors[name], torch.zeros(256 - VOCAB, 64)))


def leaked_padding_and_config(tensors, config):
    leaked_padding(tensors, config)
    config["vocab_size"] = 256


def tied_and_config(tensors, config):
    del tensors["lm_head.weight"]
    config["tie_word_embeddings"] = True


# what must be reported beside the exit code: tensors, log-probabilities, config, or an impossible model
HF_FAULTS = {
    swapped_gate_up: {"tensors", "log_probabilities"},
    unmixed_qkv: {"tensors", "log_probabilities"},
    rope_field: {"config", "log_probabilities"},
    rope_field_without_effect_here: {"config"},
    missing_layer: {"tensors", "problems"},
    missing_layer_and_config: {"tensors", "config", "log_probabilities"},
    norm_weight: {"tensors", "log_probabilities"},
    leaked_padding: {"tensors", "problems"},
    leaked_padding_and_config: {"tensors", "config", "log_probabilities"},
    tied_and_config: {"tensors", "config", "log_probabilities"},
}


@pytest.mark.parametrize("fault", HF_FAULTS, ids=lambda f: f.__name__)
def test_verify_sees_planted_faults(model, tmp_path, fault):
    directory, checkpoint = model
    bad = copy_of(directory, tmp_path / "bad")
    change_hf(bad, fault)
    code, report = verify(tmp_path, checkpoint, bad)
    assert code == 1 and not report["same"]
    found = {
        name for name in ("tensors", "log_probabilities", "config") if not report.get(name, {"same": True})["same"]
    }
    assert found | ({"problems"} if report["problems"] else set()) == HF_FAULTS[fault]
    if fault is rope_field:
        assert report["config"]["different"] == {"rope.factor": [8.0, 4.0]} and report["tensors"]["same"]
    if fault is norm_weight:
        assert list(report["tensors"]["different"]) == ["model.layers.0.post_attention_layernorm.weight"]
    if fault is missing_layer:
        assert len(report["tensors"]["only_in"]["a"]) == 9
    if fault is tied_and_config:
        assert report["tensors"]["only_in"] == {"a": ["lm_head.weight"], "b": []}


def seal(checkpoint):
    """Write the manifest anew, so that not the damage is found but what it leads to."""
    from fuserl_megatron.checkpoint.manifest import MANIFEST, describe, write_manifest

    folder = checkpoint / "iter_0000000"
    write_manifest(folder, 0, describe(f for f in folder.iterdir() if f.name != MANIFEST))


def change_checkpoint(checkpoint, key, change):
    """Change the numbers of one key in place, in the chunk's own bytes."""
    from fuserl_megatron.checkpoint import reader, torch_dist

    folder = checkpoint / "iter_0000000"
    with reader.DistReader(folder) as reader:
        offsets, sizes = reader.keys[key].chunks[-1]
        place = reader._places[key, offsets]
        numbers = torch.Size(sizes).numel()
        with open(folder / place.relative_path, "r+b", buffering=0) as file:
            _, start = torch_dist.numbers_of(file, place.offset, place.length, numbers)
            file.seek(start)
            values = torch.frombuffer(bytearray(file.read(4 * numbers)), dtype=torch.float32).view(sizes)
            file.seek(start)
            file.write(change(values).contiguous().numpy().tobytes())
    seal(checkpoint)


@pytest.mark.parametrize(
    "key,change",
    [
        ("decoder.layers.mlp.linear_fc1.weight", lambda t: t.flip(1)),
        ("decoder.layers.self_attention.linear_qkv.weight", lambda t: t.roll(8, 1)),
        ("decoder.layers.mlp.linear_fc1.layer_norm_weight", lambda t: t + 1e-3),
        ("decoder.final_layernorm.weight", lambda t: t + 1e-3 * torch.eye(64)[3]),
    ],
    ids=["gate_up rows", "qkv rows", "layer norm", "one final norm weight"],
)
def test_verify_sees_faults_inside_a_checkpoint(model, tmp_path, key, change):
    directory, checkpoint = model
    bad = copy_of(checkpoint, tmp_path / "bad")
    change_checkpoint(bad, key, change)
    code, report = verify(tmp_path, directory, bad)
    assert code == 1 and not report["tensors"]["same"] and not report["log_probabilities"]["same"]


def test_rows_of_padding_in_a_checkpoint_are_no_difference(model, tmp_path):
    directory, checkpoint = model
    other = copy_of(checkpoint, tmp_path / "other")

    def fill(values):
        values[VOCAB:] = 100.0
        return values

    change_checkpoint(other, "output_layer.weight", fill)
    assert verify(tmp_path, directory, other)[0] == 0


def test_verify_with_own_text_without_tokenizer_and_through_the_command(model, tmp_path, capsys):
    directory, checkpoint = model
    bare = copy_of(directory, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    code, report = verify(tmp_path, bare, bare)
    assert code == 0 and report["tokenizer"] == "none: fixed token ids"
    (tmp_path / "text.txt").write_text("hello\n\nworld\n")
    assert "no tokenizer" in error_line(capsys, "verify", bare, bare, "--text", tmp_path / "text.txt")
    arguments = ["verify", directory, checkpoint, "--text", tmp_path / "text.txt", "--json", tmp_path / "r.json"]
    assert cli.main([str(a) for a in arguments]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["log_probabilities"]["tokens"] == 8
    assert "log-probabilities" in capsys.readouterr().out


# --- bad input ---


def spoil_missing_shard(source):
    change_to_shards(source)
    (source / "model-00002-of-00002.safetensors").unlink()


def spoil_truncated(source):
    file = source / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def spoil_index(source):
    change_to_shards(source)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil_config(source):
    config = json.loads((source / "config.json").read_text()) | {"intermediate_size": 128}
    (source / "config.json").write_text(json.dumps(config))


def spoil_tokenizer(source):
    (source / "tokenizer.json").unlink()


def change_to_shards(source):
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names, files = list(tensors), [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {n: files[i >= len(names) // 2] for i, n in enumerate(names)}
    for file in files:
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "spoil,said",
    [
        (spoil_missing_shard, "model-00002-of-00002.safetensors: no such file"),
        (spoil_truncated, "truncated"),
        (spoil_index, "the index puts it in"),
        (spoil_config, "config.json says"),
        (spoil_tokenizer, "holds no tokenizer"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_bad_sources_are_one_line(model, tmp_path, capsys, spoil, said):
    source = copy_of(model[0], tmp_path / "source")
    spoil(source)
    assert said in error_line(capsys, "convert", "hf-to-megatron", source, tmp_path / "out")
    assert leftovers(tmp_path) == ["source"]


def spoil_distcp(checkpoint):
    os.truncate(checkpoint / "iter_0000000" / "__0_0.distcp", 1000)


def spoil_distcp_gone(checkpoint):
    (checkpoint / "iter_0000000" / "__0_0.distcp").unlink()


def spoil_dist_index(checkpoint):
    (checkpoint / "iter_0000000" / ".metadata").write_bytes(b"nonsense")


def spoil_chunks(checkpoint):
    file = checkpoint / "iter_0000000" / ".metadata"
    index = pickle.loads(file.read_bytes())
    chunks = index.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks
    chunks[1] = chunks[0]  # as many numbers as before
    file.write_bytes(pickle.dumps(index))


def spoil_pointer(checkpoint):
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("12")


def spoil_pointer_number(checkpoint):
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("²")  # a digit, but no number


def spoil_lineage(checkpoint):
    (checkpoint / "lineage.json").write_text("")


def spoil_dist_config(checkpoint):
    spoil_config(checkpoint / "hf")


def spoil_no_config(checkpoint):
    shutil.rmtree(checkpoint / "hf")


def spoil_dist_tokenizer(checkpoint):
    (checkpoint / "hf" / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "spoil,said",
    [
        (spoil_distcp, "truncated"),
        (spoil_distcp_gone, "no such file, but the checkpoint's index names it"),
        (spoil_dist_index, "not a readable checkpoint index"),
        (spoil_chunks, "lists a chunk of decoder.layers.mlp.linear_fc1.weight twice"),
        (spoil_pointer, "says '12'"),
        (spoil_pointer_number, "says '²'"),
        (spoil_lineage, "lineage.json: not readable as a JSON object"),
        (spoil_dist_config, "but the config calls for"),
        (spoil_no_config, "--hf DIR"),
        (spoil_dist_tokenizer, "holds no tokenizer"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_bad_checkpoints_are_one_line(model, tmp_path, capsys, spoil, said):
    checkpoint = copy_of(model[1], tmp_path / "checkpoint")
    spoil(checkpoint)
    seal(checkpoint)
    assert said in error_line(capsys, "convert", "megatron-to-hf", checkpoint, tmp_path / "out")
    assert leftovers(tmp_path) == ["checkpoint"]


BOTH = pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])


def source_of(model, direction):
    return model[0] if direction == "hf-to-megatron" else model[1]


@BOTH
def test_a_full_destination_needs_force_and_survives_a_failure(model, tmp_path, capsys, direction):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    source = source_of(model, direction)
    assert "--force" in error_line(capsys, "convert", direction, source, out)
    spoiled = copy_of(source, tmp_path / "spoiled")
    (spoil_truncated if direction == "hf-to-megatron" else spoil_distcp)(spoiled)
    error_line(capsys, "convert", direction, spoiled, out, "--force")
    assert leftovers(tmp_path) == ["out", "spoiled"] and (out / "precious").read_text() == "x"
    assert cli.main(["convert", direction, str(source), str(out), "--force"]) == 0
    assert not (out / "precious").exists()


@BOTH
@pytest.mark.parametrize("own_template", [False, True])
def test_the_source_is_never_replaced(model, tmp_path, capsys, direction, own_template):
    around = tmp_path / "around"
    source = copy_of(source_of(model, direction), around / "source")
    template = ["--hf", model[0]] if own_template and direction == "megatron-to-hf" else []
    line = error_line(capsys, "convert", direction, source, around, "--force", *template)
    assert "would remove the model" in line and source.is_dir()


@BOTH
@pytest.mark.parametrize("destination", ["", ".", ".."])
def test_the_current_directory_is_never_replaced(model, tmp_path, capsys, monkeypatch, direction, destination):
    """An unset variable of the shell is the empty path, which is the current directory."""
    here = tmp_path / "around" / "here"
    here.mkdir(parents=True)
    (here / "precious").touch()
    monkeypatch.chdir(here)
    line = error_line(capsys, "convert", direction, source_of(model, direction), destination, "--force")
    assert "holds the current directory" in line and (here / "precious").exists()


@BOTH
def test_a_mount_point_is_refused_before_anything_is_copied(model, tmp_path, capsys, direction):
    with mounted(tmp_path / "disk", "size=64m") as disk:
        assert "a mount point" in error_line(capsys, "convert", direction, source_of(model, direction), disk)
    assert leftovers(tmp_path) == ["disk"]


@pytest.mark.parametrize("inside", ["", "iter_0000000"])
def test_a_checkpoint_may_be_the_current_directory(model, tmp_path, monkeypatch, inside):
    monkeypatch.chdir(model[1] / inside)
    assert cli.main(["convert", "megatron-to-hf", ".", str(tmp_path / "out")]) == 0


@BOTH
def test_a_source_that_cannot_be_read_is_named_and_not_the_destination(model, tmp_path, capsys, monkeypatch, direction):
    source = source_of(model, direction)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        line = error_line(capsys, "convert", direction, source, tmp_path / "out")
        assert "cannot be read (Input/output error)" in line and str(source) in line
    monkeypatch.setattr(os, "access", lambda file, _: Path(file).name != "tokenizer.json")
    line = error_line(capsys, "convert", direction, source, tmp_path / "out")
    assert "tokenizer.json: cannot be read" in line and str(source) in line
    assert leftovers(tmp_path) == []


@BOTH
def test_a_read_only_destination_is_one_line(model, tmp_path, capsys, direction):
    with mounted(tmp_path / "disk", "size=64m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert "cannot be created (Read-only file system)" in error_line(
            capsys, "convert", direction, source_of(model, direction), disk / "out"
        )


@BOTH
@pytest.mark.parametrize(
    "limit,said", [("size=256k", "free space"), ("size=64m,nr_inodes=3", "disk is full|No space left")]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(model, tmp_path, capsys, direction, limit, said):
    """Too small from the start, and full half-way (no inodes left although the bytes would do)."""
    with mounted(tmp_path / "disk", limit) as disk:
        line = error_line(capsys, "convert", direction, source_of(model, direction), disk / "out")
        assert any(word in line for word in said.split("|")), line
        assert leftovers(disk) == []


@contextlib.contextmanager
def mounted(path, options):
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@BOTH
def test_a_write_that_fails_half_way_leaves_nothing(model, tmp_path, capsys, direction):
    """The kernel refuses every byte past 200 kB of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        line = error_line(capsys, "convert", direction, source_of(model, direction), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written (File too large)" in line
    assert leftovers(tmp_path) == []


SLOW = """
import sys, time
from fuserl_megatron.convert import shards
from fuserl_megatron.checkpoint import reader
def slowly(function):
    def read(*args, **kwargs):
        sys.stdout.write("reading\\n")  # in one piece: several threads come here
        sys.stdout.flush()
        time.sleep(0.3)
        return function(*args, **kwargs)
    return read
shards.ShardReader.read = slowly(shards.ShardReader.read)
reader.DistReader.read_rows = slowly(reader.DistReader.read_rows)
from fuserl_megatron.cli import main
sys.exit(main(sys.argv[1:]))
"""


@BOTH
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_being_stopped_half_way_leaves_nothing(model, tmp_path, direction, sent, code):
    process = run_python("-c", SLOW, "convert", direction, source_of(model, direction), tmp_path / "out")
    for _ in range(3):
        assert process.stdout.readline() == "reading\n"
    assert [name for name in leftovers(tmp_path) if name.startswith(".out.partial")]  # it was at work
    process.send_signal(sent)
    _, err = process.communicate(timeout=600)
    assert process.returncode == code and "Traceback" not in err
    assert leftovers(tmp_path) == []


def test_a_scheduler_ending_the_batch_tool_leaves_nothing(model, tmp_path):
    tool = SLOW.replace("from fuserl_megatron.cli import main", "import runpy").replace(
        "sys.exit(main(sys.argv[1:]))",
        f"runpy.run_path({str(ROOT / 'tools' / 'convert_hf_to_megatron.py')!r}, run_name='__main__')",
    )
    process = run_python("-c", tool, model[0], tmp_path / "out")
    for _ in range(3):
        assert process.stdout.readline() == "reading\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode == 143 and leftovers(tmp_path) == []
