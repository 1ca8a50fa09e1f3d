"""The Triton kernels' compiled PTX, executed by the emulator with its checks on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90")
CASES = (
    "prefill_causal",
    "decode_splits",
    "decode_everything",
    "decode_paged",
    "decode_by_lengths",
)
BACKWARD_CASES = (
    "backward_causal", "backward_everything", "backward_large_scores", "backward_packed",
)  # fmt: skip
SLOW_CASES = ("prefill_everything", "prefill_fp32", "decode_large_group", "decode_invalid_heads",
              "decode_fp8", "decode_int4", "prefill_paged", "prefill_wide",
              "decode_wide")  # fmt: skip

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]


@lru_cache
def emulated(arch: str, *cases: str, module: str = "emulate") -> list[dict]:
    """The counters of the cases' launches; an error of the emulator or a wrong result fails."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.emulation.{module}", arch, *cases],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arch", ARCHS)
def test_results_and_hazards(arch):
    launches = emulated(arch, *CASES)
    assert {launch["case"] for launch in launches} == set(CASES)
    kernels = {launch["kernel"] for launch in launches}
    assert kernels == {"prefill_kernel", "decode_kernel", "combine_kernel"}


@pytest.mark.parametrize("arch", ARCHS)
def test_decode_reads_each_byte_once(arch):
    launches = emulated(arch, *CASES)
    decode = next(launch for launch in launches if launch["case"] == "decode_splits")
    assert decode["kernel"] == "decode_kernel"
    batch, used_kv_heads, kv_len, head_dim, itemsize = 2, 2, 900, 64, 2
    k_bytes = batch * used_kv_heads * kv_len * head_dim * itemsize
    # All keys are visible to the last query token: each of their bytes has to be read,
    assert decode["unique_bytes"]["keys.rows.ptr"] == k_bytes
    assert decode["unique_bytes"]["values.rows.ptr"] == k_bytes
    # and reading each once, with the queries and the plan on top, has to be nearly all there is.
    assert decode["bytes_loaded"] <= 1.05 * 2 * k_bytes


@pytest.mark.parametrize("arch", ARCHS)
def test_decode_over_pages_reads_each_byte_once(arch):
    launches = emulated(arch, *CASES)
    decode = next(launch for launch in launches if launch["case"] == "decode_paged")
    assert decode["kernel"] == "decode_kernel"
    used_kv_heads, keys, head_dim, itemsize = 2, 620 + 300, 64, 2
    k_bytes = used_kv_heads * keys * head_dim * itemsize
    assert decode["unique_bytes"]["keys.rows.ptr"] == k_bytes
    assert decode["unique_bytes"]["values.rows.ptr"] == k_bytes
    # On top come looks at the page table, which stay in the first cache.
    assert decode["bytes_loaded"] <= 1.15 * 2 * k_bytes


@pytest.mark.parametrize(
    "arch", [ARCHS[0], *(pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS[1:])]
)
def test_gradients_and_hazards(arch):
    launches = emulated(arch, *BACKWARD_CASES)
    assert {launch["case"] for launch in launches} == set(BACKWARD_CASES)
    kernels = {launch["kernel"] for launch in launches}
    forward = {"prefill_kernel"}  # of the case whose backward has to agree with it
    assert kernels == forward | {"delta_kernel", "backward_kv_kernel", "backward_q_kernel"}


@pytest.mark.parametrize("arch", ARCHS)
def test_keep_moves_what_the_reference_moves(arch):
    launches = emulated(arch, module="triton_keep")
    assert len(launches) == 4 and {x["kernel"] for x in launches} == {"keep_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_more_results_and_hazards(arch):
    launches = emulated(arch, *SLOW_CASES)
    assert {launch["case"] for launch in launches} == set(SLOW_CASES)
