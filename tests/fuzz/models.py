"""Hugging Face model directories with something wrong in them, read as `fuserl convert` and `fuserl train` do.

Fields of config.json and RoPE x odd values; bytes of config.json, header, index and weights; tensors renamed, retyped,
resized; tokenizer files. What is accepted must have the numbers of the good model, or belong to its own config.
"""

import json
import os
import random
import shutil
import struct
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import torch
from common import Report, Wrong, attempt, for_a_while, main
from convert.conftest import make_config, make_weights, write_model

from fuserl_megatron.convert.families import FAMILIES
from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.convert.hf_io import check_weights
from fuserl_megatron.convert.offline import hf_to_megatron, megatron_to_hf
from fuserl_megatron.convert.rope import rope_inverse_frequencies
from fuserl_megatron.convert.shards import ShardReader

VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324, 1e-30),
    *(float("inf"), float("nan"), "", "x", "²", "\ud800", "\x1b[31m", "../../etc/passwd"),
    *([], [1], ["x"], {}, {"a": 1}, [[]], [{}]),
]  # fmt: skip
FIELDS = [
    *("model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    *("rope_scaling", "rope_parameters", "tie_word_embeddings", "torch_dtype", "dtype", "sliding_window"),
    *("layer_types", "use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias", "hidden_act"),
    *("auto_map", "unknown"),
    *("quantization_config", "pretraining_tp", "partial_rotary_factor", "original_max_position_embeddings"),
]  # fmt: skip
ROPE_FIELDS = [
    *("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor", "mscale"),
    *("beta_fast", "beta_slow", "mscale_all_dim", "truncate", "original_max_position_embeddings", "unknown"),
]  # fmt: skip
ROPES = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
]
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
TEXTS = [
    b"",
    b"null",
    b"[]",
    b"{",
    b"\xff\xfe",
    b"[" * 5000,
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b"9" * 5000,
    b"\0" * 9,
]


def odd_config(draw: random.Random) -> dict:
    """A good config with one to three fields set to something odd."""
    config = make_config(draw.choice(list(FAMILIES)))
    if draw.random() < 0.4:
        rope = dict(draw.choice(ROPES))
        for _ in range(draw.choice([1, 1, 2])):
            rope[draw.choice(ROPE_FIELDS)] = draw.choice(VALUES)
        return config | {draw.choice(["rope_scaling", "rope_parameters"]): rope, "rope_theta": draw.choice([1e4, 1, 2])}
    for _ in range(draw.choice([1, 1, 2, 3])):
        key = draw.choice(FIELDS)
        config[key] = draw.choice(VALUES)
        if draw.random() < 0.1:
            del config[key]
    return config


def check_config(config: dict) -> None:
    """Read it; what is accepted must give usable frequencies and keep the dictionary."""
    shape = read_config(config)
    frequencies, scaling = rope_inverse_frequencies(shape.rope, shape.head_dim)
    if not (torch.isfinite(frequencies).all() and (frequencies > 0).all() and 0 < scaling < float("inf")):
        raise Wrong(f"frequencies {frequencies} times {scaling}")
    if shape.raw != config and "nan" not in repr(config):  # NaN is not itself
        raise Wrong("the config did not come back as it was")
    if shape.hidden_size < 1 or shape.num_attention_heads % shape.num_query_groups or shape.head_dim % 2:
        raise Wrong(f"impossible sizes: {shape}")


def spoil(directory: Path, draw: random.Random) -> str:
    """Do one odd thing to a model directory; returns what."""
    kind = draw.choice(["config", "bytes", "bytes", "text", "header", "header", "index", "gone", "pipe", "folder"])
    file = directory / draw.choice(FILES)
    if kind == "config":
        (directory / "config.json").write_text(json.dumps(odd_config(draw)))
    elif kind == "bytes":
        content = bytearray(file.read_bytes())
        for _ in range(draw.choice([1, 1, 5, 20])):
            content[draw.randrange(min(len(content), draw.choice([16, 1200, 10**6])))] = draw.randrange(256)
        file.write_bytes(content[: len(content) - draw.choice([0, 0, 0, 1, 100])])
    elif kind == "text":
        file.write_bytes(draw.choice(TEXTS))
    elif kind == "header":
        _spoil_header(directory / "model.safetensors", draw)
    elif kind == "index":
        _spoil_index(directory, draw)
    else:
        file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
    return f"{kind} {file.name}"


def _spoil_header(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = draw.choice([key for key in header if key != "__metadata__"])
    match draw.choice(["dtype", "shape", "data_offsets", "entry", "name", "more", "length", "element"]):
        case "entry":
            header[name] = draw.choice(VALUES)
        case "name":
            header[draw.choice(["x", "\ud800", "model.layers.99999999999.a", name + ".b"])] = header.pop(name)
        case "more":
            header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(content) - 8 - length] * 2}
        case "length":
            length = draw.choice([0, 1, 2**63, 2**64 - 1, length - 1, length + 1])
            file.write_bytes(struct.pack("<Q", length) + content[8:])
            return
        case "element":
            list_ = header[name][draw.choice(["shape", "data_offsets"])]
            list_[draw.randrange(len(list_))] = draw.choice([*VALUES, float(list_[0]), str(list_[0])])
        case field:
            header[name][field] = draw.choice([*VALUES, "F16", "U8", [48, 48, 1], [0, 0], [96.0, 96.0]])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _spoil_index(directory: Path, draw: random.Random) -> None:
    os.rename(directory / "model.safetensors", directory / "model-00001-of-00001.safetensors")
    names = make_weights(make_config())
    places = ["model-00001-of-00001.safetensors", "../x", "/etc/passwd", "a\0b", ".", *VALUES]
    weight_map = dict.fromkeys(names, places[0])
    if draw.random() < 0.8:
        weight_map[draw.choice([*names, "x"])] = draw.choice(places)
    else:
        weight_map = draw.choice(VALUES)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def convert(directory: Path, good: dict[str, torch.Tensor]) -> None:
    """There and back; what comes out must be the numbers that the good directory had, under each name that is left."""
    check_weights(directory)
    checkpoint = hf_to_megatron(directory, directory.parent / "megatron")
    back = megatron_to_hf(checkpoint, directory.parent / "back")
    with ShardReader(directory) as before, ShardReader(back) as after:
        for name in after.tensors:
            first, second = before.read(name), after.read(name)
            if first.dtype != second.dtype or not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
                raise Wrong(f"{name} is another after the conversion")
            if name not in good:
                raise Wrong(f"{name} came from nowhere")


def run(seed: int, seconds: float, cases: int | None = None) -> Report:
    """A third of the time for configs alone, the rest for whole directories."""
    report, scratch = Report("models", seed), Path(tempfile.mkdtemp(prefix="fuzz-models-"))
    try:
        for draw in for_a_while(seconds / 3, cases and cases // 2, seed):
            config = odd_config(draw)
            attempt(report, repr(config)[:2000], lambda config=config: check_config(config))
        good = write_model(scratch / "good", make_config())
        for draw in for_a_while(seconds * 2 / 3, cases and cases - cases // 2, seed + 1):
            case = scratch / "case"
            shutil.copytree(scratch / "good", case / "hf")
            what = spoil(case / "hf", draw)
            attempt(report, what, lambda case=case: convert(case / "hf", good))
            if left := [p.name for p in case.iterdir() if p.name not in ("hf", "megatron", "back")]:
                report.failures.append(f"left over: {what}: {left}")
            shutil.rmtree(case)
    finally:
        shutil.rmtree(scratch)
    return report


if __name__ == "__main__":
    main(run)
