#!/bin/sh
# A libcuda.so.1 for machines without a driver: every function that the libraries of an environment want answers "no
# device" (100), so that they load.   usage: stub_libcuda.sh VENV
set -eu
venv=$1
mkdir -p "$venv/stub"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
libraries=$(find "$site" -name 'libtransformer_engine*.so' -o -name 'libtorch_cuda.so' -o -name 'libcudnn*.so.9')
for library in $libraries; do nm -D --undefined-only "$library"; done |
  sed -nE 's/^ +U (cu[A-Z][A-Za-z0-9_]*)(@.*)?$/int \1(void) { return 100; }/p' | sort -u >"$venv/stub/cuda.c"
gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$venv/stub/libcuda.so.1" "$venv/stub/cuda.c"
