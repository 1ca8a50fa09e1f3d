"""sm_90a: TMA, mbarrier, wgmma, clusters, bulk copies."""

import numpy as np
import pytest

from tools import ptxsim
from tools.ptxsim import TensorMap

torch = pytest.importorskip("torch")


def gemm(cuda, tb, M=100, N=128, K=320, defines=(), **kw):
    m = cuda("hopper.cu", "sm_90a", **dict.fromkeys(defines))
    g = torch.Generator().manual_seed(1)
    A, B = (torch.randn(n, K, generator=g).bfloat16() for n in (M, N))
    C = torch.zeros(M, N).bfloat16()
    Bx = B.T.contiguous() if tb else B
    r = m.launch(
        f"gemm<{str(tb).lower()}>",
        ((M + 63) // 64, N // 64),
        256,
        [
            TensorMap(A, (64, 64), swizzle="128B"),
            TensorMap(Bx, (64, 64), swizzle="128B"),
            TensorMap(C, (64, 64)),
            K,
        ],
        smem_bytes=3 * 128 * 64 * 2,
        **kw,
    )
    return r, C.float(), A.float() @ B.float().T


@pytest.mark.parametrize("tb", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_tma_wgmma_gemm(cuda, tb, seed):
    r, c, ref = gemm(cuda, tb, seed=seed)
    assert torch.allclose(c, ref, rtol=1e-2, atol=1e-2)
    assert r.tensor_flops == 2 * 128 * 128 * 320 and not r.warnings
    assert r.tma_bytes_loaded == 4 * 5 * 2 * 64 * 64 * 2


@pytest.mark.parametrize("seed", range(3))
def test_wgmma_in_flight_across_iterations(cuda, seed):
    r, c, ref = gemm(cuda, False, K=448, seed=seed, defines=("PIPELINED",))
    assert torch.allclose(c, ref, rtol=1e-2, atol=1e-2) and not r.warnings


def test_k_tail_is_zero_filled(cuda):
    _, c, ref = gemm(cuda, False, K=200)
    assert torch.allclose(c, ref, rtol=1e-2, atol=1e-2)


def test_missing_mbarrier_wait(cuda):
    with pytest.raises(ptxsim.PtxError, match="pending|race"):
        gemm(cuda, False, defines=("SKIP_FULL",))


@pytest.mark.parametrize("seed", range(3))
def test_overwriting_a_stage_in_use(cuda, seed):
    with pytest.raises(ptxsim.PtxError) as e:
        gemm(cuda, False, K=640, defines=("SKIP_EMPTY",), seed=seed)
    assert e.value.kind in ("race", "uninitialised", "mbarrier")


def test_mbarrier_deadlock_tells_where(cuda):
    with pytest.raises(ptxsim.DeadlockError, match="waiting on mbarrier .*128 of 128 arrivals"):
        gemm(cuda, False, K=640, defines=("SKIP_ARRIVE",))


def test_missing_wgmma_wait(cuda):
    r, c, _ = gemm(cuda, False, defines=("SKIP_WGWAIT",))
    assert torch.isnan(c).any() and any("wgmma" in w for w in r.warnings)


def test_missing_proxy_fence(cuda):
    r, _c, _ = gemm(cuda, False, defines=("SKIP_PROXY",))
    assert any("fence.proxy.async" in w for w in r.warnings)


def test_cluster_multicast_dsmem(cuda):
    m = cuda("hopper.cu", "sm_90a")
    x = np.arange(512, dtype="i4").reshape(8, 64)
    out = np.zeros(2048, "i4")
    for seed in range(3):
        out[:] = 0
        m.launch("cluster_kernel", 4, 64, [TensorMap(x, (4, 64)), out], seed=seed)
        assert np.array_equal(out, np.concatenate([x.ravel() + 2000, x.ravel() + 1000] * 2))


def test_bulk_copy_and_reduce(cuda):
    m = cuda("hopper.cu", "sm_90a")
    x = np.random.rand(3, 256).astype("f4")
    o = np.zeros(256, "f4")
    m.launch("bulk_add", 3, 64, [x, o])
    assert np.allclose(o, (x + 1).sum(0), rtol=1e-6)


def test_tensormap_rules():
    with pytest.raises(ptxsim.PtxError, match="multiples of 16"):
        TensorMap(np.zeros((4, 5), "f4"), (4, 4))
    with pytest.raises(ptxsim.PtxError, match="swizzle span"):
        TensorMap(np.zeros((4, 128), "f4"), (4, 64), swizzle="64B")


def test_st_async(cuda):
    m = cuda("hopper.cu", "sm_90a")
    x, y = np.random.randint(0, 1000, 256).astype("i4"), np.zeros(256, "i4")
    m.launch("exchange", 4, 64, [x, y])
    assert np.array_equal(y.reshape(2, 2, 64), x.reshape(2, 2, 64)[:, ::-1, ::-1])


@pytest.mark.parametrize("rank", [1, 3, 4, 5])
@pytest.mark.parametrize("swizzle", ["none", "32B", "64B"])
def test_tma_ranks(rank, swizzle):
    """Load a box that sticks out on every side, then add it to another tensor."""
    shape, box, at = {
        1: ((40,), (16,), (-4,)),
        3: ((3, 5, 20), (2, 4, 8), (2, -1, 16)),
        4: ((2, 3, 4, 12), (2, 2, 3, 8), (1, 2, -1, 8)),
        5: ((2, 2, 3, 4, 8), (1, 2, 2, 3, 8), (1, 1, 2, 3, 4)),
    }[rank]
    if rank == 1 and swizzle != "none":
        pytest.skip("one row only")
    if box[-1] * 4 > {"none": 999, "32B": 32, "64B": 64}[swizzle]:
        pytest.skip("box too wide")
    x = np.arange(1, 1 + np.prod(shape), dtype="f4").reshape(shape)
    y = np.full(shape, 1000, "f4")
    n = int(np.prod(box)) * 4
    c = ", ".join(str(v) for v in reversed(at))
    text = f""".version 8.6
.target sm_90a
.address_size 64
.visible .entry k(.param .align 64 .b8 a[128], .param .align 64 .b8 b[128]) {{
.shared .align 128 .b8 buf[4096]; .shared .align 8 .b64 bar;
.reg .b64 %x, %y; .reg .b32 %s, %m; .reg .pred p;
mov.b64 %x, a; mov.b64 %y, b; mov.u32 %s, buf; mov.u32 %m, bar;
mbarrier.init.shared.b64 [%m], 1;
mbarrier.arrive.expect_tx.shared.b64 _, [%m], {n};
cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%s], [%x, {{{c}}}], [%m];
W: mbarrier.try_wait.parity.shared.b64 p, [%m], 0;
@!p bra W;
cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.add.tile.bulk_group [%y, {{{c}}}], [%s];
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
ret; }}"""
    m = ptxsim.Module.from_ptx(text)
    r = m.launch(
        "k", 1, 1, [TensorMap(x, box, swizzle=swizzle), TensorMap(y, box, swizzle=swizzle)]
    )
    want = np.full(shape, 1000, "f4")
    sl = tuple(slice(max(0, o), max(0, min(o + b, s))) for o, b, s in zip(at, box, shape))
    want[sl] += x[sl]
    assert np.array_equal(y, want) and r.tma_bytes_loaded == n
