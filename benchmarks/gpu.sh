#!/usr/bin/env bash
# Everything that needs a GPU: builds the CUDA kernels, runs the device tests (which may fail but not
# skip), compute-sanitizer over every kernel, Nsight Compute, and the benchmarks; writes results.json
# and report.md, which name device, driver, torch and commit.
#
#   benchmarks/gpu.sh [--stage STAGE]... [--minutes N] [--resume] [--dry-run] [--out FOLDER]
#                     [--commit COMMIT] [--python PYTHON]
#
# --stage     build | test | sanitize | profile | bench | loop; several may be given, all by default.
#             Each takes minutes, so that a machine that is lent for ten minutes a command can run
#             them one by one: a later call adds to the results of the earlier ones in FOLDER.
#             sanitize is memcheck, racecheck, synccheck and initcheck, and bench is kernels and
#             operators, which are stages as well.
# --minutes   stop after so long: the step under way is ended, its log and what it has measured stay
# --resume    leave out the steps that have passed in FOLDER
# --dry-run   for a machine without a GPU: compiles the kernels to objects, runs them emulated on the
#             CPU, checks the benchmark cases, and prints the commands that a GPU would be given
# --out       where the results go (default: benchmarks/results/gpu-<device>-<commit>)
# --commit    what the results are of, where there is no .git to ask
# --python    an environment with a CUDA build of torch, pytest, hypothesis and the cli extra; torchsde
#             and diffusers for the loops of others (default: .venv/bin/python if there is one, else
#             python3). coup_fast need not be installed, and nothing is downloaded
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

dry_run=false
resume=false
minutes=
commit=
python=
out=
stages=()
while [ $# -gt 0 ]; do
  case $1 in
    --stage) stages+=("${2:?--stage needs a name}") && shift ;;
    --minutes) minutes=${2:?--minutes needs a number} && shift ;;
    --resume) resume=true ;;
    --dry-run) dry_run=true ;;
    --out) out=${2:?--out needs a folder} && shift ;;
    --commit) commit=${2:?--commit needs a name} && shift ;;
    --python) python=${2:?--python needs a path} && shift ;;
    -h | --help) usage && exit 0 ;;
    *) echo "unknown option $1; see --help" >&2 && exit 2 ;;
  esac
  shift
done
tools=(memcheck racecheck synccheck initcheck)
known=" build test sanitize profile bench loop ${tools[*]} kernels operators "
if [[ ! $minutes =~ ^[0-9]*$ ]]; then
  echo "--minutes needs a whole number, got $minutes" >&2
  exit 2
fi
[ ${#stages[@]} -gt 0 ] || stages=(build test sanitize profile bench loop)
for stage in "${stages[@]}"; do
  if [[ $known != *" $stage "* ]]; then
    echo "unknown stage $stage; there are:$known" >&2
    exit 2
  fi
done
if [ -z "$python" ]; then
  python=python3
  [ ! -x .venv/bin/python ] || python=.venv/bin/python
fi
wants() { [[ " ${stages[*]} " == *" $1 "* ]]; }

[ -n "$commit" ] || commit=$(git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || echo unknown)
device=none
if $dry_run; then
  out=${out:-build/gpu-dry-run}
else
  device=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) || {
    echo "no CUDA device is visible to $python; --dry-run does what can be done without one" >&2
    exit 1
  }
  slug=$(tr '[:upper:]' '[:lower:]' <<<"$device" | tr -cs 'a-z0-9' '-')
  out=${out:-benchmarks/results/gpu-${slug%-}-$commit}
fi
logs=$out/logs
mkdir -p "$logs"
echo '*' >"$logs/.gitignore"
export OMP_NUM_THREADS=1 COUP_FAST_CUDA=on COUP_FAST_FAIL_WITHOUT_CUDA=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}   # also where coup_fast is built but not installed
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # nvcc, compute-sanitizer, ncu
failed=()
left_out=()

has_passed() {
  [ -f "$out/steps.jsonl" ] && "$python" - "$out/steps.jsonl" "$1" <<'PY'
import json, sys
path, name = sys.argv[1:]
done = [step for step in map(json.loads, open(path)) if step["name"] == name]
sys.exit(not (done and done[-1]["status"] == 0))
PY
}

# A command or function of this script, until the minutes are over; then 124.
limited() {
  if [ -z "$minutes" ]; then
    "$@"
  else
    timeout --kill-after 10 $((60 * minutes - SECONDS)) bash -c '"$@"' limited "$@"
  fi
}

# One step: a line of steps.jsonl and a log. A failure doesn't stop the others.
step() {
  local stage=$1 name=$2 log status=0 start=$SECONDS
  shift 2
  log=$logs/${name// /-}.log
  if $resume && ! $dry_run && has_passed "$name"; then
    echo "== $name: passed before"
    return
  fi
  if [ -n "$minutes" ] && [ $((60 * minutes - SECONDS)) -lt 5 ]; then
    echo "== $name: left out, the time is over"
    left_out+=("$name")
    return
  fi
  echo "== $name: $*"
  # What a function of this script would run, for a reader of a dry run.
  if $dry_run && [ "$(type -t "$1")" = function ]; then declare -f "$1" | sed '1,2d;$d'; fi
  if $dry_run; then
    status=null
  else
    limited "$@" >"$log" 2>&1 || status=$?
    if [ "$status" != 0 ]; then
      failed+=("$name")
      tail -n 20 "$log" >&2
    fi
  fi
  "$python" - "$stage" "$name" "$status" $((SECONDS - start)) "$*" >>"$out/steps.jsonl" <<'PY'
import json, sys
stage, name, status, seconds, command = sys.argv[1:]
print(json.dumps({"stage": stage, "name": name, "status": json.loads(status),
                  "seconds": int(seconds), "command": command}))
PY
}

# As step, also where there is no GPU.
step_anywhere() {
  local wanted=$dry_run
  dry_run=false
  step "$@"
  dry_run=$wanted
}

# The device's own architecture alone, unless the caller wants others: a build of a minute.
build() {
  local arch=${TORCH_CUDA_ARCH_LIST:-}
  [ -n "$arch" ] ||
    arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  TORCH_CUDA_ARCH_LIST=$arch "$python" setup.py --quiet build_ext --inplace &&
    "$python" -c 'import coup_fast, json, sys
info = coup_fast.build_info()
print(json.dumps(info, indent=2))
sys.exit(not info["cuda"]["loaded"])'
}

# Without torch's caching allocator every tensor is an allocation of its own, with its own bounds. API
# errors are left to torch and to our launches, which raise; torch makes calls that may fail. Races
# and barriers are looked for in our kernels alone; initcheck has to see torch's write.
sanitize() {
  local options=(--tool "$1" --target-processes all --report-api-errors no --error-exitcode 1)
  case $1 in racecheck | synccheck) options+=(--kernel-name kns=coup_fast) ;; esac
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer "${options[@]}" \
    "$python" tests/gpu/every_kernel.py
}

metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
metrics+=,sm__inst_issued.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active
metrics+=,smsp__inst_executed.sum,launch__registers_per_thread
profile() {
  ncu --clock-control none --csv --log-file "$out/profile.csv" --kernel-name 'regex:per_quad|sample' \
    --metrics "$metrics" "$python" benchmarks/gpu_kernels.py --profile
}

export python out metrics
export -f build sanitize profile

# The cases of `coup-fast bench` that are measured on CUDA, the largest first. Each is a step: one
# that fails or is cut off takes no other with it.
cases() {
  "$python" -c 'import sys
from coup_fast.benchmarking.catalogue import FAMILIES
print(*(f.name for f in reversed(FAMILIES) if f.group == sys.argv[1] and f.cuda_batches))' "$1"
}
bench() {
  local stage=$1 group=$2 case
  for case in $(cases "$group"); do
    step "$stage" "$group $case" "$python" -m coup_fast bench --cases "$case" --device cuda \
      --force --json "$out/$group-$case.json"
  done
}

if $dry_run; then
  rm -f "$out/steps.jsonl"
  if wants build; then
    step_anywhere build "compile check" "$python" .ci/cuda_check.py --verbose --jobs 1
  fi
  if wants test; then
    step_anywhere test "emulated kernels" "$python" -m pytest -q tests/emulator
  fi
  if wants bench; then
    step_anywhere bench "benchmark cases" "$python" benchmarks/gpu_kernels.py --check-only
  fi
fi
wants build && step build "build" build
if wants test; then
  for file in tests/gpu/test_*.py; do # after a kernel that fails, CUDA refuses all of a process
    step test "${file##*/}" "$python" -m pytest -q "$file"
  done
fi
for tool in "${tools[@]}"; do
  if wants sanitize || wants "$tool"; then step sanitize "$tool" sanitize "$tool"; fi
done
if wants profile; then
  if $dry_run || command -v ncu >/dev/null; then
    step profile "profile" profile
  else
    echo "== profile: left out, there is no ncu"
  fi
fi
if wants bench || wants kernels; then
  step bench "kernels" "$python" benchmarks/gpu_kernels.py --json "$out/kernels.json"
fi
if wants bench || wants operators; then bench bench operators; fi
if wants loop; then bench loop loops; fi

"$python" benchmarks/gpu_report.py "$out" --commit "$commit" --device "$device"
if [ ${#left_out[@]} -gt 0 ]; then
  printf 'left out: %s\n' "${left_out[*]}"
fi
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[*]}" >&2
  exit 1
fi
