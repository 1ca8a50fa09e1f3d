"""The order of ``backend="auto"`` on CUDA devices, whose capability the tests pretend."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gqa_kernels import HeadMap, asym_gqa_attention, explain_backend
from gqa_kernels.attention import attention_call
from gqa_kernels.backends import dispatch, order
from gqa_kernels.call.append import AppendCall
from gqa_kernels.call.attention import AttentionCall
from gqa_kernels.decode import view_call
from tests.cases.appends import appends
from tests.cases.attention import UNEVEN

MAP = HeadMap([0, 0, 1, 1])


@pytest.fixture
def device(monkeypatch):
    """Sets the major capability of the device that is there, with every backend usable."""

    def set_major(major: int | None) -> None:
        monkeypatch.setattr(order, "_major_capability", lambda index: major)
        for name in ("cuda", "triton"):
            backend = dispatch.BACKENDS[name]
            monkeypatch.setattr(backend, "unavailable_reason", lambda: None)
            monkeypatch.setattr(backend, "prepare", lambda: None)
            monkeypatch.setattr(backend, "runner", lambda call: None)  # nothing is run

    return set_major


def tensors(q_len: int, requires_grad: bool = False):
    with FakeTensorMode():
        sizes = ((1, 4, q_len, 64), (1, 2, 40, 64), (1, 2, 40, 64))
        return [
            torch.empty(
                size, device="cuda:0", dtype=torch.bfloat16, requires_grad=requires_grad
            )
            for size in sizes
        ]  # fmt: skip


@pytest.mark.parametrize(
    "major, decode, prefill, backward",
    [
        (8, "cuda", "cuda", "cuda"),
        (9, "cuda", "cuda", "triton"),
        (10, "cuda", "triton", "triton"),
        (12, "cuda", "cuda", "cuda"),
    ],
)
def test_the_first_backend_by_architecture_and_work(device, major, decode, prefill, backward):
    """``auto`` chooses it, and explain_backend lists it first."""
    device(major)
    for q_len, requires_grad, first in [
        (1, False, decode), (order.DECODE_QUERIES, False, decode),
        (order.DECODE_QUERIES + 1, False, prefill), (1, True, backward), (200, True, backward),
    ]:  # fmt: skip
        q, k, v = tensors(q_len, requires_grad)
        assert dispatch.select(attention_call(q, k, v, MAP)).name == first
        reasons = explain_backend(asym_gqa_attention, q, k, v, MAP)
        second = "cuda" if first == "triton" else "triton"
        assert list(reasons)[:3] == [first, second, "reference"]
        assert reasons[first] == reasons[second] == []


@pytest.mark.parametrize("major", [9, 10, 12])
def test_appends_and_decode_over_caches_stay_with_cuda(device, monkeypatch, major):
    device(major)
    for kind in (AppendCall, AttentionCall):
        monkeypatch.setattr(kind, "device", torch.device("cuda:0"))
    append = appends()
    assert order.auto_order(append)[0] == "cuda"
    q = append.k_new.new_zeros(append.kv.batch, 6, 1, append.kv.head_dim)
    inputs = view_call(q, append.kv, UNEVEN)
    assert order.auto_order(inputs)[0] == "cuda"


def test_a_backend_that_is_not_usable_is_passed_over(device, monkeypatch):
    device(10)
    monkeypatch.setattr(dispatch.BACKENDS["triton"], "unavailable_reason", lambda: "not there")
    q, k, v = tensors(200)
    assert dispatch.select(attention_call(q, k, v, MAP)).name == "cuda"


def test_a_named_backend_is_taken_whatever_the_order(device):
    device(10)
    assert dispatch.select(attention_call(*tensors(200), MAP), "cuda").name == "cuda"


def test_rocm_has_no_compute_capability(monkeypatch):
    """AMD reports (9, 4) for a GPU that is no Hopper."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 4))
    assert order._major_capability(0) == 9
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert order._major_capability(0) is None


def test_every_entry_names_backends_and_work():
    for names in (*order.ORDER.values(), order.ORDER_ELSEWHERE):
        assert set(names) <= set(dispatch.BACKENDS)
    assert {work for _, work in order.TRITON_FIRST} <= {"prefill", "decode", "backward", "memory"}
