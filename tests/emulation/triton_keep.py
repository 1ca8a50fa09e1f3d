"""Emulates the compiled PTX of Triton's keep kernel: ``python -m tests.emulation.triton_keep ARCH``

The memory must be what the reference leaves, bit for bit. (The emulator looks for races in shared
memory only, and rows move in global memory: it can't tell that a barrier is missing.)
"""

from __future__ import annotations

import json
import sys

import torch

from gqa_kernels.backends.reference.cache import reference_keep
from gqa_kernels.backends.triton.launch.keep import keep_launch
from gqa_kernels.call.keep import KeepCall
from tests.cases.backward import UNEVEN
from tests.cases.kept import random_kept

from .aot import make_cache
from .emulate import emulate, report_races

CASES = {
    "pages3-bf16": (3, torch.bfloat16, None, False),
    "pages16-fp32": (16, torch.float32, None, False),
    "pages1-int4-zeros": (1, torch.bfloat16, "int4", True),
    "pages64-fp8": (64, torch.float32, "fp8_e4m3", False),
}
LENGTHS = [90, 0, 33]


def memories(case: str, arch: str) -> tuple[list[torch.Tensor], list[torch.Tensor], dict]:
    """What the reference and the emulated kernel leave, as bytes, and the emulator's counters."""
    page_size, dtype, format, zeros = CASES[case]
    kept, counts = random_kept(LENGTHS, UNEVEN.num_kv_heads, torch.Generator().manual_seed(5))
    cache = make_cache(UNEVEN, LENGTHS, 64, dtype, page_size, format, zeros)
    memory = [cache.k, cache.v, *(x for x in cache.scales.values() if x is not None)]
    memory = [x.untyped_storage() for x in memory]
    call, _ = KeepCall.create(cache.view(), kept, counts)
    before = [x.clone() for x in memory]
    reference_keep(call)
    expected = [torch.tensor(x, dtype=torch.uint8) for x in memory]
    for x, y in zip(memory, before, strict=True):
        x.copy_(y)
    counters = emulate(keep_launch(call), arch)
    return expected, [torch.tensor(x, dtype=torch.uint8) for x in memory], counters


def main() -> None:
    torch.set_num_threads(1)
    report_races()
    for case in CASES:
        expected, got, counters = memories(case, sys.argv[1])
        for x, y in zip(expected, got, strict=True):
            assert torch.equal(x, y), case
        print(json.dumps({"case": case, **counters}), flush=True)


if __name__ == "__main__":
    main()
