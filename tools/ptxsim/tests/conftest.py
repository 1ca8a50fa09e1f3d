"""Test set-up: make the package importable and share compiled modules."""

import os

import pytest

from tools import ptxsim
from tools.ptxsim.cuda import nvcc_path

HERE = os.path.dirname(os.path.abspath(__file__))

_cache = {}


@pytest.fixture
def cuda():
    """``cuda(file, arch, **defines)`` -> compiled module, cached for the session."""
    try:
        nvcc_path()
    except ptxsim.PtxError:
        pytest.skip("nvcc not found")

    def get(name, arch="sm_80", **defines):
        key = (name, arch, tuple(sorted(defines.items())))
        if key not in _cache:
            _cache[key] = ptxsim.Module.from_cuda(
                os.path.join(HERE, "kernels", name), arch, defines=defines
            )
        return _cache[key]

    return get
