"""Training memory: below expand + SDPA by at least the expanded K, V and their gradients."""

from pathlib import Path

import pytest

from benchmarks.studies import memory
from gqa_kernels.native import build


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.skipif(build.unavailable_reason() is not None, reason="no compiled kernels")
def test_backward_keeps_nothing_expanded():
    case = memory._case("llama-3.2-1b", memory.SKEWED, 1024, "float32")
    assert memory.expanded_bytes(case) == 4 * 32 * 1024 * 64 * 4
    ours, expanded = (memory.rise(case, name) for name in ("cpu", "expand+sdpa"))
    assert ours + memory.expanded_bytes(case) <= expanded
