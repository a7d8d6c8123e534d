"""`fuserl doctor`: what is installed, which features that gives, and what to type for the rest.

Packages are looked up by their metadata and files; only torch is imported (for its CUDA build and the GPUs it sees),
and that in a process of its own, so that a broken installation ends in a line of the report.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from fuserl_megatron.cli.options import Jobs, add_command
from fuserl_megatron.util.machine import usable_cores

CORE_RANGE = ((0, 16, 1), (0, 20))
"""megatron-core: from the first, below the second."""
ASK_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
names = [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus]
print(json.dumps({"cuda": torch.version.cuda, "gpus": names, "nccl": cuda and torch.distributed.is_nccl_available(),
                  "gloo": torch.distributed.is_gloo_available()}))
"""


def add(jobs: Jobs) -> None:
    """Describe the command."""
    command = add_command(
        jobs,
        "doctor",
        run,
        "what is installed, what that gives, what to do about the rest",
        """examples:
  fuserl doctor
  fuserl doctor --json

Exit code 1 when training cannot work in this environment.
""",
    )
    command.add_argument("--json", action="store_true", help="machine-readable")


def run(options: argparse.Namespace) -> int:
    """`fuserl doctor`."""
    return 0 if print_report(examine(), options.json) else 1


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    status: str
    """ok, missing (optional), or broken (training cannot work)."""
    found: str
    gives: str = ""
    """The features of the product that hang on it."""
    remedy: str = ""
    """What to type."""


def examine() -> list[Finding]:
    """Look at this environment. Takes as long as one import of torch."""
    torch = _ask_torch()
    return [
        _python(),
        _torch(torch),
        _core(),
        *(_required(name) for name in ("transformers", "datasets", "psutil", "safetensors", "hydra-core")),
        _triton(),
        _apex(),
        _package(
            "transformer-engine",
            "model.transformer_impl=transformer_engine on GPUs",
            "pip install 'fuserl-megatron[gpu]'" if torch.get("gpus") else "only of use with a GPU",
        ),
        *(_package(name, gives, f"pip install 'fuserl-megatron[{extra}]'") for name, extra, gives in _EXTRAS),
        _slurm(),
        _driver(),
        _machine(),
    ]


def print_report(findings: list[Finding], as_json: bool) -> bool:
    """Print the findings, one per line with its remedy under it, and a verdict; returns whether training can work."""
    broken = [finding.name for finding in findings if finding.status == "broken"]
    if as_json:
        print(json.dumps({"works": not broken, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return not broken
    for finding in findings:
        gives = f"  [{finding.gives}]" if finding.gives else ""
        print(f"{finding.status:8} {finding.name:20} {finding.found}{gives}")
        if finding.remedy:
            print(f"{'':8} {'':20} -> {finding.remedy}")
    print(f"training cannot work: {', '.join(broken)}" if broken else "training works here")
    return not broken


# --- packages ---

_EXTRAS = (
    ("aiohttp", "sample", "fuserl sample, logprobs"),
    ("math-verify", "rules", "fuserl score rewards=[math_verify]"),
    ("if-verifiable", "rules", "fuserl score rewards=[if_verifiable]"),
    ("nemo-run", "nemo", "fuserl launch launcher=nemo"),
    ("wandb", "track", "exp_manager.create_wandb_logger"),
    ("mlflow", "track", "exp_manager.create_mlflow_logger"),
)


def version(package: str) -> str | None:
    """Installed version of a distribution, None when it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 16, 1) of 0.16.1rc0."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found.group().split("."))) if found else ()


def _python() -> Finding:
    fine = sys.version_info >= (3, 11)
    remedy = "" if fine else "use Python 3.11 or newer: python3.11 -m venv .venv"
    return Finding(name="python", status="ok" if fine else "broken", found=platform.python_version(), remedy=remedy)


def _ask_torch() -> dict:
    """What torch says of itself; "error" when it does not import."""
    asked = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=300)
    if asked.returncode:
        lines = asked.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {asked.returncode}"}
    return json.loads(asked.stdout.strip().splitlines()[-1])


def _torch(torch: dict) -> Finding:
    if "error" in torch:
        return Finding(name="torch", status="broken", found=torch["error"], remedy="pip install torch==2.13.0")
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else "CPU build"
    gpus = torch["gpus"]
    seen = f"{len(gpus)} x {gpus[0]}" if gpus else "sees no GPU"
    if not torch["gloo"]:
        remedy = "this torch has no gloo backend; install the official wheel: pip install --force-reinstall torch"
        return Finding(name="torch", status="broken", found=f"{version('torch')}, {build}, no gloo", remedy=remedy)
    gives = "training on GPUs with NCCL, and on the CPU" if torch["nccl"] else "training on the CPU with gloo"
    return Finding(name="torch", status="ok", found=f"{version('torch')}, {build}, {seen}", gives=gives)


def _core() -> Finding:
    found, (low, high) = version("megatron-core"), CORE_RANGE
    if found and low <= numbers(found) < high:
        return Finding(name="megatron-core", status="ok", found=found)
    problem = f"{found} (outside >=0.16.1,<0.20)" if found else "not installed"
    remedy = "pip install 'megatron-core>=0.16.1,<0.20'"
    return Finding(name="megatron-core", status="broken", found=problem, remedy=remedy)


def _package(name: str, gives: str = "", remedy: str = "", needed: bool = False, note: str = "") -> Finding:
    """A package by its metadata; `note` says more of one that is not there."""
    if found := version(name):
        return Finding(name=name, status="ok", found=found, gives=gives)
    status = "broken" if needed else "missing"
    return Finding(name=name, status=status, found=f"not installed{note}", gives=gives, remedy=remedy)


def _required(name: str) -> Finding:
    note = " (megatron-core's checkpoints hang without it)" if name == "psutil" else ""
    return _package(name, remedy=f"pip install {name}", needed=True, note=note)


def _triton() -> Finding:
    """Core 0.17 and newer import triton; a CUDA torch brings it, a CPU torch does not."""
    core = version("megatron-core")
    if core and numbers(core) >= (0, 17):
        note = f", and megatron-core {core} imports it"
        return _package("triton", remedy="pip install triton", needed=True, note=note)
    return _package("triton", note=" (this megatron-core does without)")


def apex_kind(folder: Path | None) -> str:
    """none, nvidia or pypi: told apart by their files, for both are called apex and one must not even be imported."""
    if folder is None:
        return "none"
    return "nvidia" if (folder / "normalization" / "fused_layer_norm.py").is_file() else "pypi"


def _apex() -> Finding:
    spec = importlib.util.find_spec("apex")
    folder = Path(next(iter(spec.submodule_search_locations or [""]))) if spec else None
    kind = apex_kind(folder)
    if kind == "pypi":
        reason = "not NVIDIA's: an unrelated package of the same name, which megatron-core would take for it"
        return Finding(name="apex", status="broken", found=reason, remedy="pip uninstall apex")
    if kind == "nvidia":
        return Finding(name="apex", status="ok", found="NVIDIA's", gives="fused optimizer and norms on GPUs")
    remedy = "optional; from NVIDIA's repository, never `pip install apex`"
    return Finding(name="apex", status="missing", found="not installed", gives="fused optimizer on GPUs", remedy=remedy)


# --- the machine ---


def _slurm() -> Finding:
    found = [name for name in ("sbatch", "srun", "scontrol", "sacct") if shutil.which(name)]
    status = "ok" if {"sbatch", "srun"} <= set(found) else "missing"
    remedy = "" if status == "ok" else "load your cluster's SLURM module, or submit from its login node"
    gives = "runs over several nodes with sbatch and srun"
    return Finding(name="slurm", status=status, found=", ".join(found) or "no commands", gives=gives, remedy=remedy)


def _driver() -> Finding:
    if not shutil.which("nvidia-smi"):
        return Finding(name="nvidia driver", status="missing", found="no nvidia-smi")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return Finding(name="nvidia driver", status="missing", found="nvidia-smi does not answer")
    versions = sorted(set(asked.stdout.split()))
    if asked.returncode or not versions:
        return Finding(name="nvidia driver", status="missing", found="nvidia-smi finds no GPU")
    return Finding(name="nvidia driver", status="ok", found=", ".join(versions))


def _machine() -> Finding:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return Finding(
        name="machine", status="ok", found=f"{usable_cores()} cores, {memory:.0f} GiB memory, {platform.system()}"
    )
