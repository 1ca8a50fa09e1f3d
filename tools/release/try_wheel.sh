#!/usr/bin/env bash
# Installs a wheel as a new user does and runs the README's example, without a compiler on PATH.
#   bash tools/release/try_wheel.sh WHEEL FOLDER [REQUIREMENT...]
# FOLDER is made for the virtual environment. A requirement is installed with the wheel, for example
# torch==2.10.0. Prints the seconds that both took.
set -euo pipefail
readme=$(realpath "$(dirname "$0")/../../README.md")
wheel=$(realpath "$1") folder=$(realpath -m "$2")
shift 2

start=$SECONDS
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "$@" "$wheel"
installed=$SECONDS
mkdir "$folder/home"
cd "$folder/home"
env -i HOME="$folder/home" PATH=/none GQA_KERNELS_BUILD=0 "$folder/venv/bin/python" - "$readme" <<'PY'
import re
import sys
from pathlib import Path

blocks = re.findall(r"^```python\n(.*?)^```$", Path(sys.argv[1]).read_text(), re.S | re.M)
exec(compile(blocks[0], "README.md", "exec"), {})
import torch
from gqa_kernels.native import build

library = build.library_path()
assert library and library.name == build.LIBRARY, "the wheel's library must have run the example"
print(f"{library.name} on {build.cpu_instruction_set()}, torch {torch.__version__}")
# An error that the compiled code finds crosses torch as a C++ exception.
try:
    torch.ops.gqa_kernels.cache_slots_exist(torch.zeros(1), None, None, None, 1, 1, 1)
except RuntimeError as error:
    assert "kv_lengths must have 2 dims, [B, Hk], got 1" in str(error), error
else:
    raise AssertionError("a call with one dim must be refused")
PY
echo "pip install: $((installed - start)) s, the example: $((SECONDS - installed)) s"
