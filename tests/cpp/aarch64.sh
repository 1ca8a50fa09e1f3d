#!/usr/bin/env bash
# Cross-compiles the C++ tests for aarch64 and runs them in short form under qemu, on an old, a
# server's and the newest processor. Needs g++-aarch64-linux-gnu and qemu-user (Debian's names).
#   bash tests/cpp/aarch64.sh [BUILD_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-build/aarch64}

cmake -S . -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS_RELEASE=-O2 \
  -DCMAKE_CUDA_COMPILER=NOTFOUND > /dev/null
cmake --build "$build" -j"$(nproc)"

for cpu in cortex-a72 neoverse-n1 max; do
  for run in test_cpu_features test_cpu_math test_cpu_backward_sums test_cpu_float_mode \
    'test_cpu_attention 8' 'test_cpu_cache 8' 'test_cpu_backward 4'; do
    echo "== $cpu: $run"
    read -r name cases <<< "$run"
    qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu "$cpu" "$build/$name" ${cases:+"$cases"}
  done
done
