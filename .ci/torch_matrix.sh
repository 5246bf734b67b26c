#!/usr/bin/env bash
# One build of _C for several releases of torch: builds the wheel once, against the first, installs
# it beside each, and runs the operators' tests there. COUP_FAST_CUDA=off leaves _C_cuda out.
#   .ci/torch_matrix.sh                           downloads torch 2.11.0, 2.13.0 and 2.15.0
#   .ci/torch_matrix.sh venv-a venv-b venv-c      uses environments that have torch already
# The ordinary Linux builds of torch take several GB each; a CPU wheel index makes this small.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tests=(tests/ops tests/package/test_import.py)

if [ $# -eq 0 ]; then
  for version in 2.11.0 2.13.0 2.15.0; do
    "$PYTHON" -m venv "$work/torch-$version"
    "$work/torch-$version/bin/python" -m pip install --quiet "torch==$version"
    set -- "$@" "$work/torch-$version"
  done
fi

venvs=()
for venv in "$@"; do venvs+=("$(realpath "$venv")"); done
pip=(-m pip --disable-pip-version-check --quiet)
tools=(numpy 'setuptools>=77' cmake ninja)
"${venvs[0]}/bin/python" "${pip[@]}" install "${tools[@]}"
"${venvs[0]}/bin/python" "${pip[@]}" wheel --no-build-isolation --no-deps --wheel-dir "$work/wheel" .
failed=0
for venv in "${venvs[@]}"; do
  "$venv/bin/python" "${pip[@]}" install numpy pytest pytest-xdist hypothesis
  "$venv/bin/python" "${pip[@]}" install --no-deps --force-reinstall "$work"/wheel/*.whl
  printf '\n=== torch %s\n' "$("$venv/bin/python" -c 'import torch; print(torch.__version__)')"
  # The tests run away from the source tree, so that the installed package is what they import.
  rm -rf "$work/tests" && cp -r tests "$work/tests"
  (cd "$work" && OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q -n "$(nproc)" "${tests[@]}") ||
    failed=1
done
exit $failed
