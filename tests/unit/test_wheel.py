"""The wheel: what is in it, and that `fuserl` with its configuration works where there is no repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("fuserl_megatron", "conf", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True, timeout=600, cwd=out)
    (built,) = out.glob("fuserl_megatron-*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_carries_every_module_and_every_conf_file(wheel):
    actual = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fuserl_megatron").rglob("*.py")}
    conf = {f"fuserl_megatron/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    conf |= {f"fuserl_megatron/{path.relative_to(ROOT)}" for path in (ROOT / "slurm").glob("*.sbatch")}
    conf.add("fuserl_megatron/py.typed")
    assert modules | conf <= actual
    others = {name for name in actual - modules - conf if ".dist-info/" not in name}
    assert not others and any(name.endswith("licenses/LICENSE") for name in actual)


@pytest.mark.slow
def test_the_wheel_works_outside_the_repository(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=600, cwd=tmp_path)
    environ = {**os.environ, "PYTHONPATH": str(site)}
    where = [sys.executable, "-c", "import fuserl_megatron; print(fuserl_megatron.__file__)"]
    assert subprocess.check_output(where, env=environ, cwd=tmp_path, text=True).startswith(str(site))
    command = [sys.executable, str(site / "bin" / "fuserl"), "train", "recipe=llama31_8b_fusesft", "data.path=/d"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr.split(":")[2]) == (2, " model.path"), done.stderr
    done = subprocess.run(
        [*command, "model.path=/none", "--nproc", "3"],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "must be a multiple of TP 2" in done.stderr, "the recipe's layout"
