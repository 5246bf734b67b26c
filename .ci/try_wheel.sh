#!/usr/bin/env bash
# Installs a wheel as a user does who has no compiler: into a fresh environment, from ready-made
# packages, with nothing else on PATH. Then the compiled operators compute there.
#   .ci/try_wheel.sh WHEEL
# PYTHON and TORCH as in the Makefile.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
wheel=$(realpath "${1:?the wheel to try}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/venv"
cd "$work" # away from the source tree, so that the installed package is what is imported
only() { env PATH="$work/venv/bin" "$@"; }
# shellcheck disable=SC2086 # TORCH may hold several words
only python -m pip install --quiet --only-binary :all: ${TORCH:-torch==2.13.0} "$wheel"
only python "$here/smoke.py"
only coup-fast info
