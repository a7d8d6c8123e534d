"""A command planted in every file of a model directory, a run, a data set and a reference cache that any reader opens:
none runs; each is one line, or not read at all. Checkpoints' pickles: tests/distributed/test_foreign_pickles.py."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from fuserl_megatron import cli
from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model


class Evil:
    """Runs when it is unpickled."""

    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return Path.touch, (self.touched,)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "FUSERL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model, a checkpoint of it, an input and a data set."""
    root = tmp_path_factory.mktemp("good")
    save_tiny_model(root / "hf", num_hidden_layers=1)
    save_char_tokenizer(root / "hf")
    rows = [{"prompt": f"{p}", "source": s, "response": f"{p}{s}", "reward": len(s)} for p in "ab" for s in ("x", "yy")]
    (root / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["convert", "hf-to-megatron", str(root / "hf"), str(root / "megatron")]) == 0
    assert cli.main(build(root)) == 0
    return root


def build(root, *more):
    words = [f"inputs=[{root}/in.jsonl]", f"output={root}/data", f"tokenizer={root}/hf", "reward_temperature=1"]
    return ["build", *words, *more]


@pytest.fixture
def root(good, tmp_path):
    shutil.copytree(good, tmp_path / "case")
    return tmp_path / "case"


def change_json(file, **fields):
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | fields))


def python(touched):
    classes = "".join(f"class {name}: pass\n" for name in ("EvilTokenizer", "EvilModel", "EvilConfig"))
    return f"open({str(touched)!r}, 'w').close()\n{classes}"


def code_beside_the_model(root, touched):
    """As a model of the hub with code of its own has it."""
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "modeling_llama", "__init__", "setup"):
        (root / "hf" / f"{name}.py").write_text(python(touched))
    (root / "hf" / "custom_generate").mkdir()
    (root / "hf" / "custom_generate" / "generate.py").write_text(python(touched))


def model_auto_map(root, touched):
    code_beside_the_model(root, touched)
    auto = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    change_json(root / "hf" / "config.json", auto_map=auto)


def tokenizer_auto_map(root, touched):
    code_beside_the_model(root, touched)
    auto = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]}
    change_json(root / "hf" / "tokenizer_config.json", auto_map=auto, tokenizer_class="EvilTokenizer")


def tokenizer_of_a_class(root, touched):
    code_beside_the_model(root, touched)
    change_json(root / "hf" / "tokenizer_config.json", tokenizer_class="os.system")


def tokenizer_json(root, touched):
    content = json.loads((root / "hf" / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Custom", "code": python(touched)}
    (root / "hf" / "tokenizer.json").write_text(json.dumps(content))


def generation_config(root, touched):
    code_beside_the_model(root, touched)
    change_json(root / "hf" / "generation_config.json", custom_generate=str(root / "hf"), trust_remote_code=True)


def index_elsewhere(root, touched):
    (root / "hf" / "model.safetensors").unlink()
    torch.save(Evil(touched), root / "away.bin")
    change_json(root / "hf" / "model.safetensors.index.json", weight_map={"model.norm.weight": "../away.bin"})


def pickled_weights(root, touched):
    (root / "hf" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(touched)}, root / "hf" / "pytorch_model.bin")


def pickle_called_safetensors(root, touched):
    (root / "hf" / "model.safetensors").write_bytes(pickle.dumps(Evil(touched)))


def template(root, touched):
    """The usual ways out of a sandbox."""
    code = f"__import__('pathlib').Path({str(touched)!r}).touch()"
    (root / "hf" / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.system('touch " + str(touched) + "') }}"
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ self.__init__.__globals__.__builtins__.eval(\""
        + code
        + '") }}'
    )


def extension_type(touched):
    """Metadata of a column, as pyarrow once pickled its types into them."""
    content = pickle.dumps(Evil(touched))
    return {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": content}


MODELS = [
    (model_auto_map, "auto_map"),
    (tokenizer_auto_map, None),
    (tokenizer_of_a_class, None),
    (tokenizer_json, None),
    (generation_config, None),
    (index_elsewhere, "names the file '../away.bin'"),
    (pickled_weights, "pytorch_model.bin"),
    (pickle_called_safetensors, "safetensors"),
    (template, None),
]


@pytest.mark.parametrize(("plant", "refused"), MODELS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_model_directory_runs_nothing(root, tmp_path, capsys, plant, refused):
    touched = tmp_path / "touched"
    plant(root, touched)
    model = str(root / "hf")
    commands = [
        ["convert", "hf-to-megatron", model, str(tmp_path / "out"), "--allow-pickle"],
        ["verify", model, str(root / "megatron"), "--max-new-tokens", "0"],
        build(root, "force=true"),
    ]
    for command in commands:
        capsys.readouterr()
        code, error = cli.main(command), capsys.readouterr().err
        assert not touched.exists(), f"{command[0]} ran it"
        lines = [line for line in error.splitlines() if line.startswith("fuserl: error: ")]
        assert code == 0 or (code == 2 and len(lines) == 1), (command[0], error)
        if refused and command[0] != "build":
            assert code == 2 and refused in error, (command[0], error)


def test_the_planted_code_works(tmp_path):
    """The control."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "a")))
    exec(python(tmp_path / "b"))
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()


def test_a_run_s_config_and_lineage_run_nothing(root, tmp_path, capsys):
    touched = tmp_path / "touched"
    (root / "run").mkdir()
    shutil.move(root / "megatron", root / "run" / "checkpoints")
    shutil.rmtree(root / "run" / "checkpoints" / "hf")
    (root / "run" / "config.yaml").write_text(f"model: !!python/object/apply:os.system ['touch {touched}']\n")
    command = ["convert", "megatron-to-hf", str(root / "run"), str(tmp_path / "out")]
    assert cli.main(command) == 2 and "not a run's config" in capsys.readouterr().err
    (root / "run" / "checkpoints" / "lineage.json").write_bytes(pickle.dumps(Evil(touched)))
    assert cli.main(command) == 2 and "lineage.json: not readable as a JSON object" in capsys.readouterr().err
    assert not touched.exists()


def test_a_data_set_and_a_reference_cache_run_nothing(root, tmp_path):
    from fuserl_megatron.data.dataset import FusedDataset
    from fuserl_megatron.data.reference import ReferenceCache
    from fuserl_megatron.util.errors import UserError
    from fuserl_megatron.util.files import file_sha256

    touched = tmp_path / "touched"
    table = pa.ipc.open_file(root / "data" / "groups.arrow").read_all()
    evil = extension_type(touched)
    fields = [field.with_metadata(evil) for field in table.schema]
    spoilt = table.cast(pa.schema(fields, metadata={b"pandas": pickle.dumps(Evil(touched))}))
    with pa.ipc.new_file(root / "data" / "groups.arrow", spoilt.schema) as writer:
        writer.write_table(spoilt)
    file = root / "data" / "groups.arrow"
    change_json(root / "data" / "manifest.json", hash=file_sha256(file), num_bytes=file.stat().st_size)
    try:
        assert len(FusedDataset(root / "data").rewards) == 4
    except UserError:
        pass
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "reference.json").write_bytes(pickle.dumps(Evil(touched)))
    (cache / "reference_logps.f32").write_bytes(pickle.dumps(Evil(touched)))
    with pytest.raises(UserError, match="damaged reference cache"):
        ReferenceCache.open_or_create(cache, "key", 4)
    np.save(tmp_path / "x.npy", np.array([Evil(touched)], dtype=object), allow_pickle=True)
    shutil.copy(tmp_path / "x.npy", cache / "reference_logps.f32")
    (cache / "reference.json").write_text(json.dumps({"key": "key", "num_responses": 4, "sha256": None}))
    with pytest.raises(UserError, match="size"):
        ReferenceCache.open_or_create(cache, "key", 4)
    assert not touched.exists()


def test_a_parquet_input_runs_nothing(root, tmp_path, capsys):
    touched = tmp_path / "touched"
    rows = [json.loads(line) for line in (root / "in.jsonl").read_text().splitlines()]
    table = pa.Table.from_pylist(rows)
    evil = extension_type(touched)
    schema = pa.schema([f.with_metadata(evil) for f in table.schema], metadata={b"pandas": pickle.dumps(Evil(touched))})
    pyarrow.parquet.write_table(table.cast(schema), root / "in.parquet")
    assert cli.main(build(root, "force=true", f"inputs=[{root}/in.parquet]")) in (0, 2)
    assert not touched.exists()
