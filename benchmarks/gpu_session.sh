#!/usr/bin/env bash
# One call on a machine with an NVIDIA GPU and no network: build the kernels, call each op once, run
# the GPU tests, then the benchmark suites, until the time is up. Another call goes on where this one
# stopped. Each stage has a limit of its own, leaves JSON before the next begins, and may fail: the
# others run all the same.
#
#   $OUT            folder for the results (default: gpu_session); seven files at most
#   $GQA_RESUME     folder with an earlier call's files: its results are added to, and stages that
#                   it finished, whatever came of them, are not run again
#   $GQA_STAGES     stages, in order (default: all, as listed below)
#   $GQA_BUDGET_S   seconds in all (default 540)
#   $GQA_DEVICE     cuda (default), or cpu for a rehearsal without a GPU
#   $GQA_WHEELS     folder of wheels to install for the peers (default .whl; README.md says which)
#   $GIT_COMMIT     commit, where the copy has no .git
#
# Then, where the results are to stay: results/DEVICE/gpu.json and so on, python -m benchmarks.report.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

out=$(mkdir -p "${OUT:-gpu_session}" && cd "${OUT:-gpu_session}" && pwd) || exit
budget=${GQA_BUDGET_S:-540}
stages=${GQA_STAGES:-first cuda-tests tests memcheck racecheck gpu scaling-gpu e2e-gpu}
device=${GQA_DEVICE:-cuda}
log="$out/session.log"    # of all stages
state="$out/stages.json"  # what came of each stage that came to an end
scratch=$(mktemp -d)
export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE

if [[ -n "${GQA_RESUME:-}" ]]; then
  for file in "$GQA_RESUME"/*.json "$GQA_RESUME"/session.log; do
    if [[ -s "$file" && ! -e "$out/${file##*/}" ]]; then cp "$file" "$out/"; fi
  done
fi
if [[ -z "${GIT_COMMIT:-}" ]] && ! git describe --always > /dev/null 2>&1; then
  # Results may only be added to by the same code: name it by its contents.
  sum=$(find gqa_kernels csrc benchmarks \( -name '*.py' -o -name '*.h' -o -name '*.c*' \) \
    -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
  GIT_COMMIT="tree-${sum:0:10}"
fi
export GIT_COMMIT="${GIT_COMMIT:-}"

wheels=${GQA_WHEELS:-.whl}
if compgen -G "$wheels/*.whl" > /dev/null; then
  site="$scratch/site"
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$site" "$wheels"/*.whl && export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

left() { echo $((budget - SECONDS)); }

# within LIMIT_SECONDS COMMAND...: run it within its limit and what is left, its output in the log
cut=0  # whether the last limit was what is left, so that another call may do better
within() {
  local limit=$1 time_left; shift
  time_left=$(left)
  cut=$((limit > time_left - 15))
  ((limit > time_left)) && limit=$time_left
  echo "== $* (at most ${limit} s)" >> "$log"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log" | tail -n 25
  return "${PIPESTATUS[0]}"
}

# Builds and loads both libraries, calls each op once, each checked, and two of them again under
# compute-sanitizer, whose memory must be in blocks of its own. Kernels are found again when warm.
first() {
  local rc=0
  within 130 python3 -m benchmarks.studies.first_calls --device "$device" --json "$out/first.json" ||
    rc=$?
  within 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 python3 -m benchmarks.studies.first_calls \
    --device "$device" --json "$out/first.json" --only decode prefill \
    --sanitizer "compute-sanitizer --tool memcheck --error-exitcode 9" || rc=$?
  return "$rc"
}

# pytest in this process only, or a sanitizer would not see the kernels; blocks of memory of their
# own, or it would not see a read beyond one. Few cases: it slows launches a hundredfold.
sanitized() {
  within 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    python3 -m pytest -n 0 -x -q -p no:cacheprovider --junitxml "$scratch/$1.xml" \
    tests/backends/test_cuda.py tests/backends/test_cuda_append.py \
    -k "(device_map or larger_than_a_tile or pages_agree or definition and pages4) and not 200"
}

# A test that hangs on the GPU can only be ended with its process; others then go on.
hangs=()
python3 -c 'import pytest_timeout' 2> /dev/null &&
  hangs=(--timeout 90 --timeout-method thread --max-worker-restart 4)

tests() {
  local limit=$1 name=$2; shift 2
  within "$limit" python3 -m pytest -n 8 --maxfail=30 -q -p no:cacheprovider "${hangs[@]}" \
    --junitxml "$scratch/$name.xml" --durations=10 "$@"
}

# The suite stops by itself, in time for its last case.
suite() {
  local limit; limit=$(left)
  within "$((limit - 10))" python3 -m benchmarks.run --suite "$1" --device "$device" \
    --json "$out/$1.json" --resume --budget "$((limit - 50))"
}

run_stage() {
  case $1 in
    first) first ;;
    cuda-tests) tests 100 "$1" tests/backends/test_cuda.py tests/backends/test_cuda_append.py ;;
    tests) tests 120 "$1" tests/backends/test_triton.py tests/api/test_attention.py tests/cache \
      tests/api/test_gradients.py tests/api/test_compile.py tests/native/test_dropout.py tests/nn \
      tests/benchmarks/test_peers.py ;;
    memcheck | racecheck) sanitized "$1" ;;
    gpu | scaling-gpu | e2e-gpu) suite "$1" ;;
    *) echo "no stage $1" >&2; return 2 ;;
  esac
}

# Without these two nothing else can run.
[[ "$device" == cpu ]] || within 20 nvidia-smi -L || exit 1
within 60 python3 -c '
import torch
print(torch.__version__, torch.version.cuda, torch.cuda.is_available())' || exit 1

for name in $stages; do
  if grep -q "^ \"$name\": " "$state" 2> /dev/null; then
    echo "== $name: done before"
    continue
  fi
  if (($(left) < 60)); then
    echo "== $name: no time left; go on with GQA_RESUME"
    continue
  fi
  started=$SECONDS
  run_stage "$name"
  rc=$?
  echo "== $name: exit $rc after ${SECONDS} s in all"
  # A stage that ran out of the session's time is not done. A suite that stopped by itself says so.
  if ((cut && (rc == 124 || rc == 137))) || tail -n 1 "$log" | grep -q "out of time"; then
    continue
  fi
  junit=()
  [[ "$name" == *tests || "$name" == *check ]] && junit=("$scratch/$name.xml")
  python3 -m benchmarks.report.session "$state" "$name" "$rc" $((SECONDS - started)) "${junit[@]}"
done

for file in "$out"/*.json; do
  [[ -s "$file" && "$file" != "$state" ]] && python3 -c '
import collections, json, sys
data = json.load(open(sys.argv[1]))
states = collections.Counter(row["status"] for row in data["rows"])
cases = len({row.get("case_key", row.get("call")) for row in data["rows"]})
print(sys.argv[1], dict(states), cases, "cases", data["commit"])' "$file"
done
exit 0
