"""pytest plugin: kvpress's own tests on our cache (``--cache ours``) or as they are (``stock``).

Loaded by tests/integrations/kvpress_suite.py. ``DynamicCache`` is a PressedCache, and "sdpa" is our
attention. Each test's outcome goes to a file.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from swapped_attention import reason_of


def pytest_addoption(parser):
    group = parser.getgroup("swapped cache")
    group.addoption("--cache", choices=["ours", "stock"], default="ours")
    group.addoption("--outcomes", type=Path, help="file for the outcomes of all tests")


def pytest_configure(config):
    if config.getoption("--cache") == "ours":
        swap()
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes")), "outcomes of this run")


@pytest.fixture(autouse=True)
def same_attention(request):
    """Each test begins with the attention that the model was loaded with: a press may leave it on
    another one if it fails."""
    model = None
    if "unit_test_model" in request.fixturenames:
        model = request.getfixturevalue("unit_test_model")
    yield
    if model is not None:
        model.set_attn_implementation("sdpa")


def swap():
    import kvpress.pipeline
    import transformers

    from gqa_kernels.integrations.kvpress import PressedCache, register

    register("sdpa")
    model = transformers.AutoConfig.from_pretrained("MaxJeblick/llama2-0b-unit-test")

    def make(**_):
        return PressedCache(model)

    transformers.DynamicCache = kvpress.pipeline.DynamicCache = make


class Outcomes:
    def __init__(self, path: Path):
        self.path, self.found = path, {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            reason = reason_of(report) if report.outcome != "passed" else ""
            self.found[report.nodeid] = {"outcome": report.outcome, "reason": reason}

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.found))
