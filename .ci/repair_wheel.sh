#!/usr/bin/env bash
# Makes a built wheel one that may be published: gives it a manylinux tag and checks that it needs
# nothing from outside which another system, torch or Python may lack. Writes no wheel otherwise.
#   .ci/repair_wheel.sh WHEEL FOLDER
# PLATFORM is the tag, by default that of torch's own wheels: an older one would admit nobody who
# has torch. A compiler whose libraries are too new for it makes auditwheel refuse; then build in
# the manylinux_2_28 image, or set PLATFORM=auto for a wheel that fewer systems take.
set -euo pipefail
here=$(dirname "$0")
wheel=${1:?the wheel to repair} folder=${2:?where the repaired wheel goes}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

auditwheel repair --plat "${PLATFORM:-manylinux_2_28_$(uname -m)}" --only-plat \
  --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir "$work" "$wheel"
python "$here/check_wheel.py" "$work"/*.whl
abi3audit --strict --summary "$work"/*.whl
mkdir -p "$folder"
mv "$work"/*.whl "$folder"
