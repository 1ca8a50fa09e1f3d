"""The library under test, once per process."""

import json
import os

import pytest

from tests.emulation import compiled_units

from . import library

pytest.register_assert_rewrite("tests.emulation.host.checks")


@pytest.fixture(scope="session")
def host() -> library.Host:
    """The host code; ``test_planted_faults.py`` has it changed first."""
    reason = compiled_units.unavailable_reason() or library.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    plant = json.loads(os.environ.get("GQA_TEST_PLANT", "[]"))
    return library.Host(tuple(compiled_units.Replacement(*change) for change in plant))
