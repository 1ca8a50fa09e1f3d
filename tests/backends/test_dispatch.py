import subprocess
import sys
import warnings

import pytest
import torch

from gqa_kernels import (
    HeadMap,
    asym_gqa_attention,
    available_backends,
    explain_backend,
)
from gqa_kernels.attention import attention_call
from gqa_kernels.backends import dispatch
from gqa_kernels.backends.base import Capabilities
from gqa_kernels.testing import make_inputs

MAP = HeadMap([0, 1, 1])


def small(dtype=torch.float32, **kwargs):
    return (*make_inputs(1, MAP, 4, 5, 8, dtype=dtype, **kwargs), MAP)


def test_available_backends():
    names = available_backends()
    assert "reference" in names and set(names) <= set(dispatch.BACKENDS)


def test_explain_lists_every_backend_and_agrees_with_the_choice():
    for call, options in [
        (small(), {}),
        (small(torch.float64), {"causal": True}),
        (small(requires_grad=True), {"sinks": torch.zeros(3)}),
    ]:
        reasons = explain_backend(asym_gqa_attention, *call, **options)
        assert set(reasons) == set(dispatch.BACKENDS)
        inputs = attention_call(*call, **options)
        chosen = dispatch.select(inputs).name
        assert chosen == next(name for name, why in reasons.items() if not why)
        for name, why in reasons.items():
            if why:
                with pytest.raises(NotImplementedError) as error:
                    asym_gqa_attention(*call, **options, backend=name)
                assert all(reason in str(error.value) for reason in why)


def test_reasons_have_values():
    reasons = explain_backend(asym_gqa_attention, *small(torch.float64, requires_grad=True))
    for name in ("cpu", "triton"):
        assert any("dtype float64" in why for why in reasons[name])
        no_backward = any("requires grad" in why for why in reasons[name])
        assert no_backward != dispatch.BACKENDS[name].capabilities.autograd
    wide = make_inputs(1, MAP, 2, 2, 600)
    assert any(
        "head dim D = 600 (at most 576)" in why
        for why in explain_backend(asym_gqa_attention, *wide, MAP)["cpu"]
    )


def test_no_grad_lifts_the_need_for_a_backward():
    call = small(requires_grad=True)
    with torch.no_grad():
        reasons = explain_backend(asym_gqa_attention, *call)
    assert not any("requires grad" in why for whys in reasons.values() for why in whys)


def test_error_of_an_explicit_backend_says_what_was_asked():
    with pytest.raises(NotImplementedError) as error:
        asym_gqa_attention(*small(torch.float64), backend="cpu", softcap=2.0)
    assert "backend 'cpu' can't run q (1, 3, 4, 8)" in str(error.value)
    assert "with softcap" in str(error.value)


def test_auto_falls_back_and_warns_where_a_backend_fails_to_build(nothing_said, monkeypatch):
    backend = dispatch.BACKENDS["cpu"]
    monkeypatch.setattr(type(backend), "unavailable_reason", lambda self: None)
    monkeypatch.setattr(type(backend), "prepare", lambda self: "the compiler said no")
    call = small()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = asym_gqa_attention(*call)
        asym_gqa_attention(*call)
    (warning,) = seen  # one, which gives the reason
    assert "runs the eager reference" in str(warning.message)
    assert "(cpu: the compiler said no)" in str(warning.message)
    assert torch.equal(out, asym_gqa_attention(*call, backend="reference"))
    with pytest.raises(NotImplementedError, match="the compiler said no"):
        asym_gqa_attention(*call, backend="cpu")


def test_auto_says_that_a_backend_before_the_chosen_one_failed(nothing_said, monkeypatch):
    cuda = dispatch.BACKENDS["cuda"]
    monkeypatch.setattr(dispatch, "auto_order", lambda _: ("cuda", "cpu", "reference"))
    monkeypatch.setattr(type(cuda), "unavailable_reason", lambda self: None)
    monkeypatch.setattr(type(cuda), "unsupported", lambda self, call: [])
    monkeypatch.setattr(type(cuda), "prepare", lambda self: "the driver said no")
    dispatch.forget_choices()
    with pytest.warns(UserWarning, match="^gqa_kernels: backend 'cuda' is not usable: the driver"):
        asym_gqa_attention(*small())
    dispatch.forget_choices()


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_failures", {})


def test_auto_says_once_per_reason_that_it_takes_the_reference(nothing_said):
    wide = [torch.randn(1, heads, 3, 600) for heads in (2, 1, 1)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            asym_gqa_attention(*wide, [0, 0])
            asym_gqa_attention(*small(torch.float64))
            asym_gqa_attention(*wide, [0, 0], backend="reference")
            asym_gqa_attention(*(x.to("meta") for x in wide), HeadMap([0, 0]))
    messages = [str(w.message) for w in seen]
    assert len(messages) == 2
    for message, reason in zip(
        messages, ("head dim D = 600 (at most 576)", "dtype float64"), strict=True
    ):
        assert "backend='auto' runs the eager reference" in message and reason in message
        assert "pass backend='reference'" in message
    assert seen[0].filename == __file__
    assert (
        "head dim D = 600 (at most 576)"
        in explain_backend(asym_gqa_attention, *wide, [0, 0])["cpu"]
    )


def test_auto_stays_silent_with_a_fused_backend_or_while_compiling(nothing_said):
    def wide(q, k):
        return asym_gqa_attention(q, k, k, [0, 0], softcap=2.0)

    q, k = torch.randn(1, 2, 3, 600), torch.randn(1, 1, 3, 600)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a")
        asym_gqa_attention(*small())
        torch.compile(wide, fullgraph=True, backend="eager")(q, k)


def test_explanations_know_of_a_failed_build(nothing_said, monkeypatch):
    backend = dispatch.BACKENDS["cpu"]
    monkeypatch.setattr(type(backend), "unavailable_reason", lambda self: None)
    monkeypatch.setattr(type(backend), "prepare", lambda self: "the compiler said no")
    with pytest.warns(UserWarning, match="eager reference.*cpu: the compiler said no"):
        asym_gqa_attention(*small())
    assert explain_backend(asym_gqa_attention, *small())["cpu"] == ["the compiler said no"]


@pytest.mark.parametrize("backend", [None, [], 1, "CPU", {}, torch.zeros(2)])
def test_backends_have_names(backend):
    with pytest.raises(ValueError, match="backend must be one of"):
        asym_gqa_attention(*small(), backend=backend)


def test_no_backend_names_them_all(monkeypatch):
    monkeypatch.setattr(dispatch.BACKENDS["reference"], "unavailable_reason", lambda: "gone")
    with pytest.raises(NotImplementedError) as error:
        asym_gqa_attention(*small(torch.float64))
    for name in dispatch.BACKENDS:
        assert f"\n  {name}: " in str(error.value)


def test_capabilities_refuse_unknown_options():
    with pytest.raises(ValueError, match="options must be among"):
        Capabilities(frozenset({"cpu"}), frozenset(), 8, frozenset({"sparkle"}), False)


def test_import_is_light():
    """No triton, transformers or compiler at import, and little time on top of torch's."""
    code = (
        "import sys, time, torch, numpy\n"
        "start = time.process_time()\n"
        "import gqa_kernels\n"
        "seconds = time.process_time() - start\n"
        "heavy = {'triton', 'transformers', 'scipy', 'rich', 'torch.utils.cpp_extension'}\n"
        "print(seconds, sorted(heavy & set(sys.modules)))\n"
    )
    clean = subprocess.run(
        [sys.executable, "-c", code.replace("import gqa_kernels", "pass")],
        capture_output=True, text=True, check=True,
    ).stdout.split(maxsplit=1)[1]  # fmt: skip
    best = 1.0
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        seconds, heavy = run.stdout.split(maxsplit=1)
        assert heavy == clean
        best = min(best, float(seconds))
    assert best < 0.2
