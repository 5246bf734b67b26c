#!/usr/bin/env bash
# Everything that needs a GPU, in one run: builds the CUDA kernels, runs the device tests (which may
# fail but not skip), compute-sanitizer over every kernel, and the benchmarks; writes a report that
# names device, driver, torch and commit.
#
#   benchmarks/gpu.sh [--dry-run] [--out FOLDER] [--python PYTHON]
#
# --dry-run   for a machine without a GPU: compiles the kernels to objects, runs them emulated on the
#             CPU, and prints the commands that a GPU would be given
# --out       where report.md and the numbers go (default: outputs/gpu-<commit>)
# --python    an environment with a CUDA build of torch and the test and bench extras
#             (default: .venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

dry_run=false
python=.venv/bin/python
commit=$(git describe --always --dirty --abbrev=12 --exclude='*')
out=outputs/gpu-$commit
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=true ;;
    --out) out=${2:?--out needs a folder} && shift ;;
    --python) python=${2:?--python needs a path} && shift ;;
    -h | --help) usage && exit 0 ;;
    *) echo "unknown option $1; see --help" >&2 && exit 2 ;;
  esac
  shift
done
mkdir -p "$out"
report=$out/report.md
export OMP_NUM_THREADS=1 COUP_FAST_CUDA=on COUP_FAST_FAIL_WITHOUT_CUDA=1

failed=()

# One step: its command, its output and its time go to the report. A failure doesn't stop the others.
step() {
  local name=$1 log status=0 start=$SECONDS
  shift
  log=$out/${name// /-}.log
  echo "== $name: $*"
  if $dry_run; then
    printf -- '- %s (not run): `%s`\n' "$name" "$*" >>"$report"
    return
  fi
  "$@" >"$log" 2>&1 || status=$?
  [ "$status" = 0 ] || failed+=("$name")
  {
    printf '\n## %s: %s, %d s\n\n`%s`\n\n```\n' "$name" \
      "$([ "$status" = 0 ] && echo passed || echo "FAILED ($status)")" $((SECONDS - start)) "$*"
    tail -n 40 "$log"
    printf '```\n'
  } >>"$report"
}

# As step, also where there is no GPU.
step_anywhere() {
  local wanted=$dry_run
  dry_run=false
  step "$@"
  dry_run=$wanted
}

describe() {
  printf '# CUDA run of coup_fast %s\n\n' "$commit"
  printf -- '- date: %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)"
  printf -- '- toolkit: %s\n' "$(nvcc --version 2>/dev/null | tail -n 1 || echo 'nvcc not on PATH')"
  "$python" -c 'import torch; print(f"- torch {torch.__version__}, CUDA {torch.version.cuda}")'
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    nvidia-smi --format=csv,noheader,nounits \
      --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.memory |
      sed 's/^/- device (driver, capability, MiB, MHz, MHz): /'
  else
    printf -- '- device: none\n'
  fi
}

describe | tee "$report"
if ! $dry_run && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA device is visible to $python; --dry-run does what can be done without one" >&2
  exit 1
fi

step_anywhere "compile check" "$python" .ci/cuda_check.py --verbose
if $dry_run; then
  step_anywhere "emulated kernels" "$python" -m pytest -q tests/test_cuda_emulated.py \
    tests/test_cuda_index.py
fi
step "build" "$python" setup.py --quiet build_ext --inplace
step "device tests" "$python" -m pytest -q tests/gpu
# Without torch's caching allocator every tensor is an allocation of its own, with its own bounds.
for tool in memcheck racecheck synccheck initcheck; do
  step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
    --error-exitcode 1 "$python" tests/gpu/every_kernel.py
done
step "bench" "$python" -m coup_fast bench --device cuda --force --json "$out/bench.json"
step "benchmark suite" "$python" -m pytest -q benchmarks/test_operators.py --bench-device cuda \
  --benchmark-json "$out/benchmarks.json"

if [ ${#failed[@]} -gt 0 ]; then
  printf '\nFAILED: %s\n' "${failed[*]}" | tee -a "$report" >&2
  exit 1
fi
printf '\n%s\n' "$($dry_run && echo 'dry run: no number here was measured on a device' ||
  echo 'all steps passed')" | tee -a "$report"
echo "report: $report"
