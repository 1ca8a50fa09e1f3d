"""Settings every test runs under."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # one busy neighbour makes torch 25x slower

import pytest
import torch
from hypothesis import HealthCheck, settings

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
def fresh_choices():
    """Tests change what backends can run: no choice of another test is kept."""
    forget_choices()


@pytest.fixture
def device() -> str:
    return DEVICE
