"""Control flow, warp operations, memory spaces and launches of small CUDA kernels."""

import struct

import numpy as np
import pytest

from tools import ptxsim


def test_vadd_mask(cuda):
    m = cuda("basic.cu")
    n = 1000
    a, b = np.random.rand(n).astype("f4"), np.random.rand(n).astype("f4")
    c = np.full(n, -1, "f4")
    r = m.launch("vadd", 4, 256, [a, b, c, n - 50])
    assert np.array_equal(c[: n - 50], (a + b)[: n - 50]) and (c[n - 50 :] == -1).all()
    assert r.unique_bytes_read == 8 * (n - 50) and r.unique_bytes_written == 4 * (n - 50)


def test_poisoned_output(cuda):
    m = cuda("basic.cu")
    a, c = np.ones(64, "f4"), np.zeros(64, "f4")
    m.launch("vadd", 1, 64, [a, a, c[8:48], 30], poison=[2])
    assert (c[8:38] == 2).all() and np.isnan(c[38:48]).all() and (c[48:] == 0).all()


def test_partial_warp_and_views(cuda):
    m = cuda("basic.cu")
    buf = np.arange(300, dtype="f4")
    a, b = buf[:100], buf[100:200]
    c = buf[200:]
    m.launch("vadd", (2,), (50,), [a, b, c, 100])
    assert np.array_equal(c, np.arange(100, 300, 2))


def collatz(v):
    s = 0
    while v != 1 and s <= 500:
        v = 3 * v + 1 if v & 1 else v >> 1
        s += 1
    return s


def test_divergent_loops(cuda):
    m = cuda("basic.cu")
    x = np.random.default_rng(0).integers(1, 5000, 100).astype("u4")
    y = np.zeros(100, "i4")
    m.launch("collatz", 1, 128, [x, y, 100])
    assert y.tolist() == [collatz(int(v)) for v in x]


def nested_ref(x, i):
    a = 0
    for j in range(x):
        for k in range((j ^ i) % 5):
            if (k + j) % 3 == 0:
                continue
            a += k * j + 1
            if a > 300:
                return a
        if j % 7 == i % 7:
            a ^= 5
    return a


def test_nested_divergence_reconverges(cuda):
    m = cuda("basic.cu")
    x = np.random.default_rng(1).integers(0, 60, 32).astype("i4")
    y = np.zeros(64, "i4")
    m.launch("nested", 1, 32, [x, y])
    assert y[:32].tolist() == [nested_ref(int(x[i]), i) for i in range(32)]
    assert (y[32:] == 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_block_reduction(cuda, seed):
    m = cuda("basic.cu")
    x = np.random.rand(3000).astype("f4")
    out = np.zeros(1, "f4")
    m.launch("block_sum", 3, 160, [x, out, 3000], seed=seed)
    assert np.allclose(out[0], x.sum(), rtol=1e-5)


def test_warp_ops(cuda):
    m = cuda("basic.cu")
    rng = np.random.default_rng(2)
    x = rng.integers(-500, 500, 32).astype("i4")
    x[4] = 7
    o = np.zeros((16, 32), "u4")
    m.launch("warp_ops", 1, 32, [x, o])
    u = x.view("u4")
    lane = np.arange(32)
    pos = sum(1 << i for i in range(32) if x[i] > 0)
    assert (o[0] == pos).all()
    assert (o[1] == 3).all()
    assert np.array_equal(o[2], np.where(lane >= 3, u[lane - 3], u))
    assert np.array_equal(o[3], [u[i + 5] if i % 16 + 5 < 16 else u[i] for i in lane])
    assert np.array_equal(o[4], u[lane * 7 % 32])
    assert np.array_equal(o[5], u[lane ^ 9])
    assert o[6].tolist() == [sum(1 << j for j in lane if (x[j] & 3) == (x[i] & 3)) for i in lane]
    assert (o[7].view("i4") == x.sum()).all() and (o[8].view("i4") == x.max()).all()
    assert (o[9] == np.bitwise_or.reduce(u)).all()

    def ffs(v):
        return (v & -v).bit_length()

    assert o[10].tolist() == [
        (bin(int(v)).count("1") + ((32 - int(v).bit_length()) << 8) + (ffs(int(v)) << 16))
        & 0xFFFFFFFF
        for v in u
    ]
    assert o[11].tolist() == [int(f"{int(v):032b}"[::-1], 2) for v in u]

    def perm(a, b, s):
        by = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        return int.from_bytes(bytes(by[(s >> (4 * k)) & 7] for k in range(4)), "little")

    assert o[12].tolist() == [perm(int(v), int(~v), 0x3715) for v in u]
    assert o[13].tolist() == [
        (((int(~v) << 32 | int(v)) << i) >> 32) & 0xFFFFFFFF for i, v in enumerate(u)
    ]
    k = np.frombuffer(struct.pack("<I", 0x01020304), "i1").astype(int)
    assert o[14].view("i4").tolist() == [
        int((np.frombuffer(v.tobytes(), "i1") * k).sum()) + 5 for v in u
    ]
    assert (o[15] == bin(pos).count("1") + (1 << 16)).all()


def test_struct_calls_local_switch_printf(cuda):
    m = cuda("basic.cu")
    x = np.random.rand(10).astype("f4")
    out = np.zeros(64, "f4")
    before = int(m.variable("counter").view("i4")[0])
    r = m.launch("misc", 1, 64, [ptxsim.Struct(struct.pack("<Qif", 0, 10, 2.0), {0: x}), out])
    ref = []
    for i in range(64):
        loc = [x[(i + j) % 10] * np.float32(2) for j in range(8)]
        s = np.float32(0)
        for k in range(i % 4):
            s = s * x[i % 10] + np.float32(k)
        v = loc[(i * 3) & 7] + np.float32(1 << (i & 3)) + s
        c = i % 6
        v = [v + 1, v * 2, v - loc[i & 7], -v, v + 100, v / 3][c]
        ref.append(v)
    assert np.allclose(out, ref, rtol=1e-6)
    assert r.printed == f"thread 5 sees {x[5]:.3f} ok\n"
    assert int(m.variable("counter").view("i4")[0]) == before + 64


def test_assert(cuda):
    m = cuda("basic.cu")
    m.launch("checked", 1, 64, [64])
    with pytest.raises(ptxsim.DeviceTrap, match="assertion failed"):
        m.launch("checked", 1, 64, [40])


def test_integers(cuda):
    m = cuda("basic.cu")
    rng = np.random.default_rng(3)
    n = 32
    a = rng.integers(-(2**62), 2**62, n)
    b = rng.integers(-(2**40), 2**40, n)
    b[b == 0] = 3
    o = np.zeros((10, n), "i8")
    m.launch("integers", 1, n, [a, b, o, n])

    def tdiv(x, y):
        q = abs(x) // abs(y)
        return q if (x < 0) == (y < 0) else -q

    def s32(x):
        return (int(x) + 2**31) % 2**32 - 2**31

    def s64(x):
        return (int(x) + 2**63) % 2**64 - 2**63

    for i in range(n):
        x, y = int(a[i]), int(b[i])
        assert o[0, i] == tdiv(x, y) and o[1, i] == x - tdiv(x, y) * y
        assert o[2, i] == (x * y) >> 64
        assert o[3, i] == tdiv(s32(x), s32(y | 1))
        assert o[4, i] == s32(x) % 2**32 % (s32(y | 1) % 2**32)
        assert o[5, i] == x >> (y & 63)
        assert o[6, i] == s64((x % 2**64) >> (y & 63))
        assert o[7, i] == min(x, y) ^ max(s32(x), s32(y))
        assert o[8, i] == ((x % 2**32) * (y % 2**32)) >> 32
        assert o[9, i] == int(np.float32(x)) + y


def test_split_k_last_block(cuda):
    m = cuda("basic.cu")
    a = np.random.rand(20, 64).astype("f4")
    part, out = np.zeros((6, 64), "f4"), np.zeros(64, "f4")
    for _ in range(2):
        m.launch("split_k", 6, 64, [a, part, out, 20])
        assert np.allclose(out, a.sum(0), rtol=1e-5)


@pytest.mark.parametrize("schedule", ["random", "round-robin"])
def test_coresident_spin(cuda, schedule):
    m = cuda("basic.cu")
    turn, order = np.zeros(1, "i4"), np.full(5, -1, "i4")
    m.launch("turns", 5, 64, [turn, order], coresident=True, schedule=schedule)
    assert order.tolist() == [4, 3, 2, 1, 0]
    with pytest.raises(ptxsim.DeadlockError):
        m.launch("turns", 5, 64, [np.zeros(1, "i4"), order], spin_limit=2000, schedule=schedule)


def test_atomics(cuda):
    m = cuda("basic.cu")
    x = np.random.default_rng(4).random(500).astype("f4")
    fs, im, h, best = np.zeros(1, "f4"), np.zeros(1, "i4"), np.zeros(16, "u4"), np.zeros(1, "u8")
    m.launch("atomics", 4, 128, [x, fs, im, h, best, 500])
    assert np.allclose(fs[0], x.sum(), rtol=1e-5) and im[0] == int((x * np.float32(1000)).max())
    assert np.array_equal(h, np.bincount((x * 16).astype(int) & 15, minlength=16))
    assert int(best[0]) & 0xFFFFFFFF == int(x.argmax())


def test_processes(cuda):
    m = cuda("basic.cu")
    n = 4000
    a, b, c = np.random.rand(n).astype("f4"), np.random.rand(n).astype("f4"), np.zeros(n, "f4")
    r1 = m.launch("vadd", 16, 256, [a, b, c, n])
    assert np.array_equal(c, a + b)
    c[:] = 0
    r2 = m.launch("vadd", 16, 256, [a, b, c, n], procs=2)
    assert np.array_equal(c, a + b)
    assert (r1.warp_instructions, r1.global_sectors, r1.unique_bytes_read) == (
        r2.warp_instructions,
        r2.global_sectors,
        r2.unique_bytes_read,
    )
    with pytest.raises(ptxsim.MemoryFault):
        m.launch("vadd", 16, 256, [a, b, c[:100].copy(), n], procs=2)


def test_named_barriers(cuda):
    m = cuda("basic.cu")
    for seed in range(5):
        o = np.zeros(32, "i4")
        m.launch("named_barriers", 1, 64, [o], seed=seed)
        assert np.array_equal(o, (np.arange(32) ^ 5) * 3)


def test_cli(capsys):
    import os

    from tools.ptxsim.__main__ import main

    main(["info", os.path.join(os.path.dirname(__file__), "kernels", "basic.cu")])
    out = capsys.readouterr().out
    assert "block_sum" in out and "registers" in out
