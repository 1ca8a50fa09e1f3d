"""Settings every test runs under."""

import os
import random
import zlib
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # one busy neighbour makes torch 25x slower
# Triton's interpreter multiplies with numpy. OpenBLAS's kernels for AVX-512 sum Q K^T and K Q^T in
# different orders, which no device does: fp32 scores then differ between forward and backward.
CPU_FACTS = Path("/proc/cpuinfo")
if CPU_FACTS.exists() and "avx512f" in CPU_FACTS.read_text():
    os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")

import numpy  # noqa: E402  (it, and torch, read the environment)
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels on CPU tensors

# Machines that run the tests may be busy: how long an example takes proves nothing.
settings.register_profile(
    "gqa-kernels", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gqa-kernels")

from gqa_kernels.backends.dispatch import forget_choices  # noqa: E402  (reads the environment)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` gives NaN, so that an output left unwritten can't pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed(request):
    """A test draws the same numbers whichever tests ran before; others if ``GQA_TEST_SEED=7``."""
    number = zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("GQA_TEST_SEED", "0"))
    number %= 2**32
    for set_seed in (torch.manual_seed, random.seed, numpy.random.seed):
        set_seed(number)


@pytest.fixture(autouse=True)
def fresh_choices():
    """Tests change what backends can run: no choice of another test is kept."""
    forget_choices()


@pytest.fixture
def device() -> str:
    return DEVICE
