"""Offline conversion measured against `cp -r` of the same files: seconds, and peak resident memory of the process.

    python benchmarks/conversion.py --dir /scratch --json conversion.json
    python benchmarks/conversion.py --models 1.2B --repeats 1

Makes random bf16 models with Llama 3.2's shapes in several files, converts each to a Megatron checkpoint and back, each
time in a process of its own, compares the weights that came back, and removes everything it wrote. Needs about four
times a model's size on the disk.

Our directories are on the device when the command returns (fsync); `cp -r` leaves that to the kernel. So both are
given: `cp` as it is, and `cp` followed by `sync -f`. The files read are in the page cache for all of them, and dirty
pages are flushed before each measurement. The start of the interpreter and the import of torch (the difference of
`process` and `conversion`) do not depend on the model and are left out of the ratios.
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
CHILD = """
import sys, time
from fuserl_megatron.mcore import offline
started = time.monotonic()
getattr(offline, sys.argv[1])(sys.argv[2], sys.argv[3])
seconds = time.monotonic() - started
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(seconds, int(status["VmHWM"].split()[0]) * 1024)
"""


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


def copy_seconds(source: Path, destination: Path) -> tuple[float, float]:
    """Seconds of `cp -r`, and of `cp -r` and flushing what it wrote."""
    warm(source)
    started = time.monotonic()
    subprocess.run(["cp", "-r", source, destination], check=True)
    copied = time.monotonic() - started
    subprocess.run(["sync", "-f", destination], check=True)
    flushed = time.monotonic() - started
    shutil.rmtree(destination)
    return copied, flushed


def convert(direction: str, source: Path, destination: Path) -> tuple[float, float, int]:
    """Seconds of one conversion's process, of the conversion alone, and the process's peak resident bytes."""
    warm(source)
    started = time.monotonic()
    command = [sys.executable, "-c", CHILD, direction, str(source), str(destination)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    inside, peak = found.stdout.split()
    return time.monotonic() - started, float(inside), int(peak)


def warm(directory: Path) -> None:
    """Bring the files into the page cache, and flush what earlier steps wrote."""
    subprocess.run(["sync", "-f", directory], check=True)
    subprocess.run(f"find '{directory}' -type f -exec cat {{}} + > /dev/null", shell=True, check=True)


def measure(name: str, root: Path, repeats: int, shard_bytes: int) -> dict:
    """All figures of one model."""
    source, there, back = root / "hf", root / "megatron", root / "back"
    largest = make_model(source, name, shard_bytes)
    size = sum(file.stat().st_size for file in source.iterdir())
    rows = []
    for repeat in range(repeats):
        for direction, a, b in (("hf_to_megatron", source, there), ("megatron_to_hf", there, back)):
            copied, flushed = copy_seconds(a, root / "copy")
            process, inside, peak = convert(direction, a, b)
            row = dict(direction=direction, process=process, conversion=inside, cp=copied, cp_and_flush=flushed)
            row |= dict(ratio_to_cp=inside / copied, ratio_to_cp_and_flush=inside / flushed, peak_bytes=peak)
            rows.append(row)
            print(name, repeat, {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        if not same_weights(source, back):
            raise SystemExit(f"{name}: the weights that came back differ")
        shutil.rmtree(there)
        shutil.rmtree(back)
    shutil.rmtree(source)
    return dict(model=name, bytes=size, largest_tensor_bytes=largest, runs=rows)


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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shard-gb", type=float, default=1.0, help="of the generated files (default 1.0)")
    parser.add_argument("--dir", default=None, help="where to write (default: the system's temporary directory)")
    parser.add_argument("--json", default=None, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = dict(
        cores=os.cpu_count(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        python=platform.python_version(),
        torch=torch.__version__,
        models=[],
    )
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="fuserl-conversion-", dir=options.dir) as root:
            report["models"].append(measure(name, Path(root), options.repeats, int(options.shard_gb * 1e9)))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
