"""Triton kernels compiled ahead of time for sm_80 and sm_90, compared with torch."""

import math

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tools import ptxsim  # noqa: E402

compile_ = ptxsim.Module.from_triton
archs = pytest.mark.parametrize("arch", [80, 90])


@triton.jit
def k_add(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@triton.jit
def k_softmax(x, o, stride, n, B: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, B)
    m = c < n
    v = tl.load(x + r * stride + c, mask=m, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(o + r * stride + c, e / tl.sum(e, 0), mask=m)


@triton.jit
def k_matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        x = tl.load(
            a + rm[:, None] * K + rk[None, :], mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0
        )
        y = tl.load(
            b + rk[:, None] * N + rn[None, :], mask=(rk[:, None] < K) & (rn[None, :] < N), other=0.0
        )
        acc = tl.dot(x, y, acc)
    tl.store(
        c + rm[:, None] * N + rn[None, :],
        acc.to(c.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


@triton.jit
def k_flash(q, k, v, o, N, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    pm = tl.program_id(0)
    off = tl.program_id(1) * N * D
    rm = pm * BM + tl.arange(0, BM)
    rd = tl.arange(0, D)
    Q = tl.load(q + off + rm[:, None] * D + rd[None, :], mask=rm[:, None] < N, other=0.0)
    mi = tl.full((BM,), -float("inf"), tl.float32)
    li = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for s in range(0, tl.minimum(N, (pm + 1) * BM), BN):
        rn = s + tl.arange(0, BN)
        K = tl.load(k + off + rn[None, :] * D + rd[:, None], mask=rn[None, :] < N, other=0.0)
        S = tl.dot(Q, K) * scale
        S = tl.where((rm[:, None] >= rn[None, :]) & (rn[None, :] < N), S, -float("inf"))
        mn = tl.maximum(mi, tl.max(S, 1))
        al = tl.exp2(mi - mn)
        P = tl.exp2(S - mn[:, None])
        li = li * al + tl.sum(P, 1)
        V = tl.load(v + off + rn[:, None] * D + rd[None, :], mask=rn[:, None] < N, other=0.0)
        acc = tl.dot(P.to(V.dtype), V, acc * al[:, None])
        mi = mn
    tl.store(
        o + off + rm[:, None] * D + rd[None, :],
        (acc / li[:, None]).to(o.dtype.element_ty),
        mask=rm[:, None] < N,
    )


@triton.jit
def k_desc(ap, bp, cp, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    pm, pn = tl.program_id(0), tl.program_id(1)
    a = tl.make_tensor_descriptor(ap, [M, K], [K, 1], [BM, BK])
    b = tl.make_tensor_descriptor(bp, [N, K], [K, 1], [BN, BK])
    c = tl.make_tensor_descriptor(cp, [M, N], [N, 1], [BM, BN])
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([pm * BM, k]), b.load([pn * BN, k]).T, acc)
    c.store([pm * BM, pn * BN], acc.to(tl.float16))


@triton.jit
def k_hostdesc(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    pm, pn = tl.program_id(0), tl.program_id(1)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([pm * BM, k]), b.load([pn * BN, k]).T, acc)
    c.store([pm * BM, pn * BN], acc.to(tl.float16))


@archs
def test_vector_add(arch):
    m = compile_(
        k_add, {"x": "*fp32", "y": "*fp32", "o": "*fp32", "n": "i32"}, {"B": 512}, arch=arch
    )
    x, y, o = torch.randn(1300), torch.randn(1300), torch.zeros(1300)
    m.launch((3,), [x, y, o, 1300])
    assert torch.equal(o, x + y)
    with pytest.raises(ptxsim.MemoryFault, match="test_triton.py"):
        m.launch((3,), [x, y[:900].clone(), o, 1300])


def test_autotuned_kernel():
    tuned = triton.autotune([triton.Config({}, num_warps=4)], key=["n"])(k_add)
    m = compile_(tuned, {"x": "*fp32", "y": "*fp32", "o": "*fp32", "n": "i32"}, {"B": 256}, arch=80)
    x, o = torch.randn(256), torch.zeros(256)
    m.launch((1,), [x, x, o, 256])
    assert torch.equal(o, x + x)


@archs
def test_softmax(arch):
    m = compile_(
        k_softmax, {"x": "*fp32", "o": "*fp32", "stride": "i32", "n": "i32"}, {"B": 512}, arch=arch
    )
    x, o = torch.randn(5, 400), torch.zeros(5, 400)
    m.launch((5,), {"x": x, "o": o, "stride": 400, "n": 400})
    assert torch.allclose(o, x.softmax(1), atol=1e-6)


@archs
@pytest.mark.parametrize(
    "ty,dt,tol",
    [
        ("fp16", torch.float16, 3e-2),
        ("bf16", torch.bfloat16, 2e-1),
        ("fp32", torch.float32, 5e-2),
        ("fp8e4nv", torch.float8_e4m3fn, 1e-1),
    ],
)
def test_matmul(arch, ty, dt, tol):
    if ty == "fp8e4nv" and arch == 80:
        pytest.skip("fp8 needs sm_89")
    out = {"fp8e4nv": "fp32"}.get(ty, ty)
    m = compile_(
        k_matmul,
        dict(a="*" + ty, b="*" + ty, c="*" + out, M="i32", N="i32", K="i32"),
        dict(BM=64, BN=64, BK=32),
        arch=arch,
        attrs=dict(N=16, K=16),
    )
    M, N, K = 100, 96, 128
    a, b = torch.randn(M, K).to(dt), torch.randn(K, N).to(dt)
    c = torch.zeros(M, N, dtype=torch.float32 if out == "fp32" else dt)
    r = m.launch((2, 2), [a, b, c, M, N, K])
    assert (c.float() - a.float() @ b.float()).abs().max() < tol
    assert r.classes["mma"] and not r.warnings


@archs
@pytest.mark.parametrize("stages", [1, 3])
def test_flash(arch, stages):
    m = compile_(
        k_flash,
        dict(q="*bf16", k="*bf16", v="*bf16", o="*bf16", N="i32", scale="fp32"),
        dict(D=64, BM=64, BN=64),
        arch=arch,
        num_stages=stages,
    )
    q, k, v = (torch.randn(2, 150, 64).bfloat16() for _ in range(3))
    o = torch.zeros_like(q)
    r = m.launch((3, 2), [q, k, v, o, 150, math.log2(math.e) / 8])
    ref = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True
    )
    assert (o.float() - ref).abs().max() < 2e-2 and not r.warnings
    assert ("wgmma" in m.text) == (arch == 90)
    print(
        f"\nflash sm_{arch} stages {stages}: {r.warp_instructions} warp instructions, "
        f"{r.seconds:.2f} s, {r.speed:,.0f}/s"
    )


@archs
def test_tensor_descriptors(arch):
    from triton.tools.tensor_descriptor import TensorDescriptor

    M, N, K = 100, 128, 192
    a, b = torch.randn(M, K).half(), torch.randn(N, K).half()
    ref = a.float() @ b.float().T
    sizes = dict(BM=64, BN=64, BK=64)
    m = compile_(
        k_desc,
        dict(ap="*fp16", bp="*fp16", cp="*fp16", M="i32", N="i32", K="i32"),
        sizes,
        arch=arch,
        attrs=dict(K=16, N=16),
    )
    c = torch.zeros(M, N).half()
    m.launch((2, 2), [a, b, c, M, N, K])
    assert (c.float() - ref).abs().max() < 5e-2
    t = "tensordesc<fp16[64, 64]>"
    m = compile_(k_hostdesc, dict(a=t, b=t, c=t, K="i32"), sizes, arch=arch)
    c.zero_()
    m.launch(
        (2, 2),
        [TensorDescriptor(x, list(x.shape), list(x.stride()), [64, 64]) for x in (a, b, c)] + [K],
    )
    assert (c.float() - ref).abs().max() < 5e-2
