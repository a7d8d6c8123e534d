#!/bin/sh
# The environment of `make rehearse-gpu`: torch for CUDA, megatron-core and Transformer Engine, none of which needs a GPU
# or a driver to be imported.
#   usage: install.sh VENV CORE_VERSION TE_VERSION           (Python 3.12 or newer as $PYTHON, gcc, nm)
# Transformer Engine's torch extension comes as source: it is built here against the CUDA headers that torch's packages
# bring along (10 to 20 minutes on 2 cores). WHEELS=FOLDER takes any wheel that lies there instead.
set -eu
venv=$1 core=$2 te=$3
pip="$venv/bin/python -m pip --quiet --disable-pip-version-check"
found=${WHEELS:+--find-links $WHEELS}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
$pip install torch==2.11.0
$pip install numpy einops packaging pydantic importlib_metadata onnxscript onnx psutil safetensors transformers pyyaml \
  hydra-core omegaconf pyarrow datasets tensorboard rich 'pytest>=8' setuptools wheel pybind11 ninja
$pip install --no-deps $found "megatron-core==$core" "transformer-engine==$te" "transformer-engine-cu13==$te"
$pip install --no-deps $found nvdlfw-inspect  # imported by Transformer Engine's debugging part
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
PATH="$(cd "$venv/bin" && pwd):$PATH" CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} MAX_JOBS=${MAX_JOBS:-2} \
  CPATH="$site/nvidia/cu13/include:$site/nvidia/cudnn/include:$site/nvidia/nccl/include" \
  NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE \
  $pip install --no-deps --no-build-isolation $found "transformer-engine-torch==$te"
sh "$(dirname "$0")/stub_libcuda.sh" "$venv"
touch "$venv/.installed"
