"""What the GPU peers pass to their libraries. CPU stand-ins do what those libraries document."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.data.cases import backward, decode, prefill
from benchmarks.ops.attention import Gate, Problem
from benchmarks.ops.backward import BackwardGate, BackwardProblem, backward_peers
from benchmarks.peers import gpu as gpu_peers
from benchmarks.peers import peers
from benchmarks.peers.torch import UNEVEN

MODEL = "smollm2-135m"
MAPS = ("even", "4-3-2", "5-0-4", "interleaved")


def ragged(q, starts, kv_of, scale):
    """q ``[total, H, D]``; the rows of sequence i attend to ``kv_of(i)``, ``[Sk, H, D]``."""
    out = torch.empty_like(q)
    for i, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        k, v = kv_of(i)
        rows = [x.transpose(0, 1) for x in (q[start:stop], k, v)]
        out[start:stop] = scaled_dot_product_attention(*rows, scale=scale).transpose(0, 1)
    return out


def fa3_forward(
    q, k, v, *, softmax_scale, is_causal=False, window_size_left=-1, window_size_right=-1,
    cu_seqlens_q=None, seqused_k=None, max_seqlen_q=None, kv_batch_idx=None,
):  # fmt: skip
    """FlashAttention-3: q ``[B, Sq, H, D]`` or, with ``cu_seqlens_q``, ``[total, H, D]``."""
    if seqused_k is not None:
        assert seqused_k.dtype == torch.int32 and (seqused_k == k.shape[1]).all()
    if cu_seqlens_q is not None:
        assert cu_seqlens_q.dtype == torch.int32 and len(cu_seqlens_q) == len(k) + 1
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        return [ragged(q, cu_seqlens_q, lambda i: (k[i], v[i]), softmax_scale)]
    if kv_batch_idx is not None:
        assert kv_batch_idx.dtype == torch.int32 and len(kv_batch_idx) == len(q)
        k, v = k[kv_batch_idx], v[kv_batch_idx]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    i = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    j = torch.arange(k.shape[2])
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    mask &= (j <= i) if is_causal or window_size_right == 0 else mask
    mask &= (j >= i - window_size_left) if window_size_left >= 0 else mask
    out = scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True)
    return [out.transpose(1, 2)]


def flash_attn_func(q, k, v, *, causal, window_size):
    """FlashAttention-4: q ``[B, Sq, H, D]``; gives the LSE, or None, too."""
    assert q.shape[2] % k.shape[2] == 0 and not (causal and window_size[0] is not None)
    left, right = window_size
    mask = {"is_causal": causal}
    if left is not None:
        mask |= {"window_size_left": left, "window_size_right": right}
    return fa3_forward(q, k, v, softmax_scale=q.shape[-1] ** -0.5, **mask)[0], None


def flash_attn_varlen_func(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
):  # fmt: skip
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None


def varlen_attn(q, k, v, starts, key_starts, max_q, max_k):
    assert max_q == starts.diff().max() and max_k == key_starts.diff().max()

    def kv_of(i):
        keys = slice(key_starts[i], key_starts[i + 1])
        return k[keys], v[keys]

    return ragged(q, starts, kv_of, q.shape[-1] ** -0.5)


class PagedPrefill:
    """FlashInfer's wrapper: pages of K and of V ``[pages, page, heads, D]``."""

    def __init__(self, workspace, layout):
        assert workspace.dtype == torch.uint8 and layout == "NHD"

    def plan(
        self, starts, page_starts, pages, last_page_len, heads, kv_heads, dim, page, **options
    ):
        assert all(x.dtype == torch.int32 for x in (starts, page_starts, pages, last_page_len))
        assert (last_page_len == page).all() and heads == kv_heads == 1 and not options["causal"]
        self.starts, self.page_starts, self.pages = starts, page_starts, pages
        self.shape = (page, kv_heads, dim)

    def run(self, q, kv):
        assert all(x.shape[1:] == self.shape for x in kv)

        def kv_of(i):
            pages = self.pages[self.page_starts[i] : self.page_starts[i + 1]]
            return [x[pages].flatten(0, 1) for x in kv]

        return ragged(q, self.starts, kv_of, q.shape[-1] ** -0.5)


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(gpu_peers, "_fa3", lambda: fa3_forward)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    library = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=PagedPrefill)
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    fa4 = SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
    )
    monkeypatch.setitem(sys.modules, "flash_attn.cute", fa4)


@pytest.mark.parametrize(
    "case",
    [
        *decode(MODEL, MAPS, 2, 32),
        *prefill(MODEL, ("even", "4-3-2"), 2, 13),
        *prefill(MODEL, ("even",), 1, 13, window=4),
    ],
    ids=lambda case: case.key,
)
def test_gpu_peers_are_right_on_what_their_libraries_promise(case, stand_ins):
    problem = Problem.build(case, torch.device("cpu"))
    gate = Gate(problem)
    ran = []
    for name, peer in peers().items():
        if isinstance(peer, gpu_peers.GpuPeer) and not peer.unsupported_reason(problem):
            prepared = peer.prepare(problem)
            gate.check(prepared.result(prepared.run(0)))
            ran.append(name)
    rows = {"fa3-rows", "fa3-batch-index", "fa4-rows", "varlen-rows", "flashinfer-rows"}
    expected = {"fa3-expanded", "fa4-expanded"} | (rows if case.op == "decode" else set())
    assert set(ran) == expected | ({"fa3-gqa", "fa4-gqa"} if case.head_map.is_uniform else set())


@pytest.mark.parametrize("name", ["even", "4-3-2"])
def test_backward_of_flash_attention_4(name, stand_ins):
    (case,) = backward(MODEL, (name,), 1, 13)
    problem = BackwardProblem.build(case, torch.device("cpu"))
    gate = BackwardGate(problem)
    for peer in (p for key, p in backward_peers().items() if key.startswith("fa4")):
        if peer.unsupported_reason(problem):
            assert (peer.name, name) == ("fa4-gqa", "4-3-2")
            continue
        prepared = peer.prepare(problem)
        gate.check(prepared.result(prepared.run(0)))


def test_they_say_what_they_do_not_take():
    problem = Problem.build(decode(MODEL, ("4-3-2",), 1, 20)[0], torch.device("cpu"))
    known = peers()
    assert "multiple of 16" in known["flashinfer-rows"].unsupported_reason(problem)
    assert known["fa3-gqa"].unsupported_reason(problem) == UNEVEN
    exact = Problem.build(decode(MODEL, ("4-3-2",), 1, 16, "float32")[0], torch.device("cpu"))
    assert known["fa3-rows"].unsupported_reason(exact) == "fp16 and bf16 only"
    assert "import fa3_fwd_interface" in gpu_peers._fa3_reason()
    assert "import flash_attn.cute" in gpu_peers.fa4_missing()
    biased = Problem.build(prefill("t5-base", ("even",), 1, 8)[0], torch.device("cpu"))
    assert known["fa4-gqa"].unsupported_reason(biased) == "no additive mask"
