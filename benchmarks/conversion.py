"""Offline conversion measured against `cp -r` of the same files: seconds, and peak resident memory of the process.

    python benchmarks/conversion.py --dir /scratch --json conversion.json
    python benchmarks/conversion.py --models 1.2B --repeats 1

Makes random bf16 models with Llama 3.2's shapes in several files, converts each to a Megatron checkpoint and back, each
time in a process of its own, compares the weights that came back, and removes everything it wrote. Needs about four
times a model's size on the disk.

Our directories are on the device when the command returns (fsync); `cp -r` leaves that to the kernel. So both are
given: `cp` as it is, and `cp` followed by `sync -f`. `cp` and the conversion take turns inside one process, each after
its source was read once, the last copy removed and everything flushed, so that page cache and free memory are alike for
both. On virtual machines memory that was free for some seconds can cost several times the copy when it is used again:
compare minima. The start of the interpreter and the import of torch, which do not depend on the model, are given apart.
"""

import argparse
import filecmp
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fuserl_megatron.convert.hf_config import read_config
from fuserl_megatron.convert.names import hf_shapes
from fuserl_megatron.convert.shards import ShardWriter

MODELS = {
    "1.2B": dict(num_hidden_layers=16, hidden_size=2048, num_attention_heads=32, head_dim=64),
    "3.2B": dict(num_hidden_layers=28, hidden_size=3072, num_attention_heads=24, head_dim=128),
}
COMMON = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    intermediate_size=8192,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
)


def make_model(directory: Path, name: str, shard_bytes: int) -> int:
    """Writes a random model; returns the bytes of its largest tensor."""
    config = COMMON | MODELS[name]
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    shapes = hf_shapes(read_config(config))
    block = torch.randn(2**24 + 1, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    largest = 0
    with ShardWriter(directory, shapes, torch.bfloat16, shard_bytes) as writer:
        for tensor_name, shape in shapes.items():
            numbers = torch.Size(shape).numel()
            largest = max(largest, 2 * numbers)
            writer.write(tensor_name, block.repeat(-(-numbers // block.numel()))[:numbers].view(shape))
    return largest


def settle(source: Path, destination: Path) -> None:
    """Remove what was written, flush, and bring the source into the page cache."""
    shutil.rmtree(destination, ignore_errors=True)
    subprocess.run(["sync", "-f", source], check=True)
    subprocess.run(f"find '{source}' -type f -exec cat {{}} + > /dev/null", shell=True, check=True)


def take_turns(direction: str, source: Path, destination: Path, repeats: int) -> None:
    """What the measuring process does: prints the seconds of each turn and its peak resident bytes as JSON."""
    from fuserl_megatron.convert import offline

    turns = []
    for _ in range(repeats):
        settle(source, destination)
        started = time.monotonic()
        subprocess.run(["cp", "-r", source, destination], check=True)
        copied = time.monotonic() - started
        subprocess.run(["sync", "-f", destination], check=True)
        flushed = time.monotonic() - started
        settle(source, destination)
        started = time.monotonic()
        getattr(offline, direction)(source, destination)
        turns.append(dict(cp=copied, cp_and_flush=flushed, conversion=time.monotonic() - started))
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(json.dumps(dict(turns=turns, peak_bytes=int(status["VmHWM"].split()[0]) * 1024)))


def start_seconds() -> float:
    """Seconds of a process that only imports the converter."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "from fuserl_megatron.convert import offline"], check=True)
    return time.monotonic() - started


def measure(name: str, root: Path, repeats: int, shard_bytes: int) -> dict:
    """All figures of one model."""
    source, there, back = root / "hf", root / "megatron", root / "back"
    largest = make_model(source, name, shard_bytes)
    size = sum(file.stat().st_size for file in source.iterdir())
    report = dict(model=name, bytes=size, largest_tensor_bytes=largest)
    for direction, a, b in (("hf_to_megatron", source, there), ("megatron_to_hf", there, back)):
        command = [sys.executable, __file__, "--turns", direction, str(a), str(b), "--repeats", str(repeats)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        best = {key: min(turn[key] for turn in found["turns"]) for key in found["turns"][0]}
        found["ratio_to_cp"] = best["conversion"] / best["cp"]
        found["ratio_to_cp_and_flush"] = best["conversion"] / best["cp_and_flush"]
        print(name, direction, json.dumps(found), flush=True)
        report[direction] = found
    if not same_weights(source, back):
        raise SystemExit(f"{name}: the weights that came back differ")
    return report


def same_weights(source: Path, back: Path) -> bool:
    """Tensor by tensor, whatever the files are called."""
    from fuserl_megatron.convert.shards import ShardReader

    with ShardReader(source) as a, ShardReader(back) as b:
        if a.tensors.keys() != b.tensors.keys():
            return False
        same = all(torch.equal(a.read(n).view(torch.int16), b.read(n).view(torch.int16)) for n in a.tensors)
    return same and filecmp.cmp(source / "tokenizer.json", back / "tokenizer.json", shallow=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shard-gb", type=float, default=1.0, help="of the generated files (default 1.0)")
    parser.add_argument("--dir", default=None, help="where to write (default: the system's temporary directory)")
    parser.add_argument("--json", default=None, help="write the figures to this file")
    parser.add_argument("--turns", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="the smaller model, once")
    options = parser.parse_args()
    if options.quick:
        options.models, options.repeats = ["1.2B"], 1
    torch.set_num_threads(1)
    if options.turns:
        direction, source, destination = options.turns
        return take_turns(direction, Path(source), Path(destination), options.repeats)
    report = dict(
        cores=os.cpu_count(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        python=platform.python_version(),
        torch=torch.__version__,
        start_seconds=start_seconds(),
        models=[],
    )
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="fuserl-conversion-", dir=options.dir) as root:
            report["models"].append(measure(name, Path(root), options.repeats, int(options.shard_gb * 1e9)))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
