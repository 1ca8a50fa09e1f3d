#!/usr/bin/env bash
# One call on a GPU machine: build the extension, run the tests, measure the gpu suite and write the
# report. Every stage has a time limit and leaves a mark when it is through, so that another call on
# the same machine, or one that is given the results of an earlier call, goes on from there.
#
#   $OUT            folder for results and logs (default: gpu_session)
#   $GQA_BUDGET_S   seconds in all (default 540)
#   $GQA_RESUME     results JSON of an earlier call to go on with
#   $GIT_COMMIT     commit, where the copy has no .git
#
# Peers that are not installed are left out with their reason; carry them as wheels on PYTHONPATH.
set -uo pipefail
cd "$(dirname "$0")/.."

out=$(mkdir -p "${OUT:-gpu_session}" && cd "${OUT:-gpu_session}" && pwd)
state="${GQA_STATE:-$HOME/.cache/gqa_kernels_session}"   # marks of the stages, on this machine
budget=${GQA_BUDGET_S:-540}
results="$out/gpu.json"
mkdir -p "$state"
export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
export GIT_COMMIT="${GIT_COMMIT:-unknown}"

left() { echo $((budget - SECONDS)); }

# stage NAME LIMIT_SECONDS COMMAND...: run it once per machine, within its limit and what is left
stage() {
  local name=$1 limit=$2; shift 2
  if [[ -e "$state/$name.done" ]]; then
    echo "== $name: done before"; return 0
  fi
  local time_left; time_left=$(left)
  if ((time_left < 20)); then
    echo "== $name: no time left"; return 1
  fi
  ((limit > time_left)) && limit=$time_left
  echo "== $name (at most ${limit} s)"
  timeout --kill-after=10 "$limit" "$@" > >(tee "$out/$name.log" | tail -n 15) 2>&1
  local rc=$?
  echo "== $name: exit $rc after ${SECONDS} s in all"
  ((rc == 0)) && touch "$state/$name.done"
  return $rc
}

for copy in "${GQA_RESUME:-}" "$state/gpu.json"; do
  if [[ -n "$copy" && -s "$copy" && ! -e "$results" ]]; then cp "$copy" "$results"; fi
done

stage device 20 bash -c 'nvidia-smi -L && python3 -c "
import torch, triton
print(torch.__version__, triton.__version__, torch.cuda.get_device_name())"' || exit 1
# CPU kernels, and with nvcc the CUDA kernels for the device at hand.
stage build 240 python3 -c "
from gqa_kernels import extension
extension.load()
extension.load('cuda')
print(extension.cuda_build_info())"
stage tests 240 python3 -m pytest --maxfail=20 -q -p no:cacheprovider --durations=10 tests
# A reduced set of the CUDA kernels' tests, whose launches the sanitizer slows down a hundredfold.
for tool in memcheck racecheck; do
  stage "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 python3 -m pytest -x -q \
    -p no:cacheprovider tests/backends/test_cuda.py \
    -k "(device_map or larger_than_a_tile or pages_agree) and not 200"
done

# The suite stops by itself, in time for its last case, the copy and the report.
time_left=$(left)
measure=$((time_left - 60))
if ((measure > 20)); then
  echo "== suite (${measure} s)"
  timeout --kill-after=10 $((time_left - 20)) \
    python3 -m benchmarks.run --suite gpu --device cuda --json "$results" --resume \
    --budget "$measure" 2>&1 | tee "$out/suite.log" | tail -n 60
  [[ -s "$results" ]] && cp "$results" "$state/gpu.json"
fi

if [[ -s "$results" ]]; then
  python3 - "$results" <<'PY'
import collections, json, sys
data = json.load(open(sys.argv[1]))
states = collections.Counter(row["status"] for row in data["rows"])
print("rows:", dict(states), "cases:", len({row["case_key"] for row in data["rows"]}))
PY
fi
