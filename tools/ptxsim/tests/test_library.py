"""Kernels using cooperative groups, cuda::barrier, cuda::pipeline and nvcuda::wmma."""

import numpy as np
import pytest


@pytest.fixture
def lib(cuda):
    return cuda("library.cu", "sm_90a")


def test_cg_reduce(lib):
    x, o = np.random.rand(64).astype("f4"), np.zeros(64, "f4")
    lib.launch("cg_reduce", 1, 64, [x, o])
    ref = np.repeat(x.reshape(2, 32).sum(1), 32) + 1000 * np.repeat(x.reshape(8, 8).max(1), 8) + 32
    assert np.allclose(o, ref, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_barrier_and_pipeline(lib, seed):
    x, o = np.random.rand(5, 128).astype("f4"), np.zeros((5, 128), "f4")
    lib.launch("barrier_copy", 1, 128, [x, o, 5], seed=seed)
    assert np.array_equal(o, 2 * x[:, np.arange(128) ^ 33])
    x, o = np.random.rand(5, 64, 4).astype("f4"), np.zeros((5, 64, 4), "f4")
    lib.launch("pipeline_copy", 1, 64, [x, o, 5], seed=seed)
    ref = x[:, ::-1].copy()
    ref[..., 0] += 1
    assert np.array_equal(o, ref)


def test_wmma(lib):
    a, b = (np.random.randn(16, 64).astype("f2") for _ in range(2))
    c = np.zeros((16, 16), "f4")
    lib.launch("wmma_gemm", 1, 32, [a, b, c, 64])
    assert np.allclose(c, (a.astype("f4") @ b.astype("f4").T + 1) / 2, atol=1e-4)


def test_vector_atomics(lib):
    o, h, b, d = np.zeros(4, "f4"), np.zeros(2, "f2"), np.zeros(2, "u2"), np.zeros(1)
    lib.launch("vector_atomics", 1, 64, [o, h, b, d])
    assert o.tolist() == [64, 128, 192, 2016] and h.tolist() == [64, 32] and d[0] == 16
    assert (b.astype("u4") << 16).view("f4").tolist() == [64, 128]


def test_cluster_histogram(lib):
    x, h = np.random.randint(0, 128, 1000).astype("i4"), np.zeros(128, "i4")
    lib.launch("cluster_hist", 4, 96, [x, h, 1000])
    assert np.array_equal(h, np.bincount(x, minlength=128))
