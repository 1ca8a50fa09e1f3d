"""pytest plugin: transformers' own tests with this package instead of SDPA and FlashAttention.

Loaded by tests/integrations/transformers_suite.py into a pytest that runs transformers' tests, of
models on the CPU:

- "sdpa" is our attention (``--attention ours``) or stays torch's (``stock``);
- a model that is asked for "flash_attention_2" gets "sdpa", so that the tests of FlashAttention run
  as well, without the package and the GPU that they ask for;
- models whose SDPA or FlashAttention lacks sinks or softcap are said to have both: ours has them;
- tests marked slow run, and a test said to be flaky runs once.

Each selected test is reported with its outcome, the reason of a skip or failure, and how often it
called the attention: a test that never did says nothing about it.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

# What of a model's tests is about attention; the first match names the group.
GROUPS = {
    "eager against SDPA": r"test_eager_matches_sdpa_",
    "packed sequences": r"test_\w+_padding_matches_padding_free_with_position_ids",
    "eager against FlashAttention": r"test_(flash_attn_2_|flash_attention_2_|eager_matches_fa2_)",
    "training": r"test_(training|enable_input_require_grads)",
    "batches and masks": r"test_(batching_equivalence|custom_4d_attention_mask|left_padding|"
    r"sliding_window_mask|sdpa_can_dispatch_non_composite)",
}
GENERATION = "generation"  # whatever transformers marks so
# Not for this machine, or of no attention but the eager one.
LEFT_OUT = (
    r"compil|multi_accelerator|model_parallel|hub_gen_strategies|quant_cache|fp32_ln|"
    r"flash_attention_[34]|dict_output|eager_padding|overfit"
)


def pytest_addoption(parser):
    group = parser.getgroup("swapped attention")
    group.addoption("--attention", choices=["ours", "stock"], default="ours")
    group.addoption("--backend", default="auto")
    group.addoption("--outcomes", type=Path, help="file for the outcomes of all tests")


def pytest_configure(config):
    config.pluginmanager.register(Swap(config), "swapped attention of this run")
    for name in ("slow", "generate", "torch_compile_test", "flash_attn_test"):
        config.addinivalue_line("markers", f"{name}: of transformers")


class Swap:
    """One run: what it replaces, the calls it counts, the outcomes it reports."""

    def __init__(self, config):
        self.ours = config.getoption("--attention") == "ours"
        self.outcomes = config.getoption("--outcomes")
        self.calls = 0
        self.found: dict[str, dict] = {}
        self.before: list[tuple[object, str, object]] = []
        self._restore_functions_later()
        if self.ours:
            from gqa_kernels.integrations.transformers import register

            register("sdpa", config.getoption("--backend"))
        self._count_calls()
        self._flash_is_sdpa()
        self._run_all()

    def _replace(self, owner, name, value):
        self.before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _restore_functions_later(self):
        from transformers import AttentionInterface, AttentionMaskInterface

        for interface in (AttentionInterface, AttentionMaskInterface):
            self._replace(interface, "_global_mapping", dict(interface._global_mapping))

    def _count_calls(self):
        from transformers import AttentionInterface

        attention = AttentionInterface._global_mapping["sdpa"]

        def counted(*args, **kwargs):
            self.calls += 1
            return attention(*args, **kwargs)

        AttentionInterface.register("sdpa", counted)

    def _flash_is_sdpa(self):
        from transformers import PreTrainedModel

        check = PreTrainedModel._check_and_adjust_attn_implementation

        def adjusted(model, implementation, *args, **kwargs):
            if implementation == "flash_attention_2":
                implementation = "sdpa"
            return check(model, implementation, *args, **kwargs)

        self._replace(PreTrainedModel, "_check_and_adjust_attn_implementation", adjusted)

    def _run_all(self):
        from transformers import testing_utils

        for name in ("slow", "require_flash_attn", "require_torch_accelerator"):
            self._replace(testing_utils, name, lambda test: test)
        once = lambda *given, **_: given[0] if given and callable(given[0]) else lambda test: test  # noqa: E731
        self._replace(testing_utils, "is_flaky", once)

    def pytest_collection_modifyitems(self, config, items):
        if self.ours:
            self._say_what_ours_can()
        selected, others = [], []
        for item in items:
            (selected if group_of(item) else others).append(item)
        items[:] = selected
        config.hook.pytest_deselected(items=others)

    def _say_what_ours_can(self):
        from transformers import PreTrainedModel

        classes = [PreTrainedModel]
        for one in classes:
            classes += one.__subclasses__()
        for one in classes[1:]:
            if one._supports_attention_backend and not (
                one._supports_sdpa and one._compatible_flash_implementations is None
            ):
                self._replace(one, "_supports_sdpa", True)
                self._replace(one, "_compatible_flash_implementations", None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        before = self.calls
        self.found[item.nodeid] = {"group": group_of(item), "outcome": "passed", "reason": ""}
        result = yield
        self.found[item.nodeid]["calls"] = self.calls - before
        return result

    def pytest_runtest_logreport(self, report):
        if report.outcome == "passed" or report.nodeid not in self.found:
            return
        kept = self.found[report.nodeid]
        if kept["outcome"] != "failed":
            kept.update(outcome=report.outcome, reason=reason_of(report))

    def pytest_unconfigure(self):
        for owner, name, value in reversed(self.before):
            setattr(owner, name, value)
        if self.outcomes is not None:
            version = importlib.metadata.version("transformers")
            found = {"transformers": version, "tests": self.found}
            self.outcomes.write_text(json.dumps(found, indent=1))


def group_of(item: pytest.Item) -> str | None:
    """The group of a test; None where it is not about attention on this machine."""
    of_model = item.cls is not None and item.cls.__name__.endswith("ModelTest")
    if not of_model or re.search(LEFT_OUT, item.name):
        return None
    if item.get_closest_marker("torch_compile_test") is not None:
        return None
    for group, pattern in GROUPS.items():
        if re.match(pattern, item.name):
            return group
    return GENERATION if item.get_closest_marker("generate") is not None else None


def reason_of(report: pytest.TestReport) -> str:
    """The last line that says why, without a path."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).split("\n")[0][:300]
