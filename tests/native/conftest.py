import pytest

from gqa_kernels.native import build

from .machine import Machine


@pytest.fixture(scope="session")
def library():
    """The library of the sources as they are."""
    reason = build.unavailable_reason()
    if reason:
        pytest.skip(reason)
    build.load()
    return build.library_path()


@pytest.fixture
def machine(tmp_path, library):
    return Machine(tmp_path, library)
