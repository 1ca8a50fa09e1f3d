"""Single instructions, written in PTX, against independent numpy or Python references."""

import numpy as np
import pytest

from tools import ptxsim

from .lanes import HEAD, run

rng = np.random.default_rng(7)
EDGE = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x80, 0xFF, 0xFFFF]
U = [
    np.array(EDGE + rng.integers(0, 2**32, 32 - len(EDGE)).tolist(), "u4"),
    rng.permutation(np.array(EDGE + rng.integers(0, 2**32, 32 - len(EDGE)).tolist(), "u4")),
    rng.permutation(np.array(EDGE + rng.integers(0, 64, 32 - len(EDGE)).tolist(), "u4")),
]


def s(x):
    return x - 2**32 if x >= 2**31 else x


def tdiv(a, b):
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def bfe(a, p, n, signed):
    p, n = p & 255, n & 255
    if n == 0:
        return 0
    out = 0
    sb = (a >> min(p + n - 1, 31)) & 1 if signed else 0
    for k in range(32):
        bit = (a >> (p + k)) & 1 if k < n and p + k < 32 else sb
        out |= bit << k
    return out


def bfi(a, b, p, n):
    p, n = p & 255, n & 255
    for k in range(n):
        if p + k < 32:
            b = b & ~(1 << (p + k)) | ((a >> k) & 1) << (p + k)
    return b


def prmt(a, b, c):
    by = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    r = 0
    for k in range(4):
        n = (c >> (4 * k)) & 15
        v = by[n & 7]
        if n & 8:
            v = 255 if v & 128 else 0
        r |= v << (8 * k)
    return r


INT = {
    "add.u32 %d0, %a0, %a1;": lambda a, b, c: a + b,
    "sub.s32 %d0, %a0, %a1;": lambda a, b, c: a - b,
    "mul.lo.s32 %d0, %a0, %a1;": lambda a, b, c: a * b,
    "mul.hi.s32 %d0, %a0, %a1;": lambda a, b, c: (s(a) * s(b)) >> 32,
    "mul.hi.u32 %d0, %a0, %a1;": lambda a, b, c: (a * b) >> 32,
    "mad.lo.u32 %d0, %a0, %a1, %a2;": lambda a, b, c: a * b + c,
    "mad.hi.s32 %d0, %a0, %a1, %a2;": lambda a, b, c: ((s(a) * s(b)) >> 32) + c,
    "mul24.lo.u32 %d0, %a0, %a1;": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "div.s32 %d0, %a0, %a1;": lambda a, b, c: tdiv(s(a), s(b)) if b else 0xFFFFFFFF,
    "rem.u32 %d0, %a0, %a1;": lambda a, b, c: a % b if b else None,
    "min.s32 %d0, %a0, %a1;": lambda a, b, c: min(s(a), s(b)),
    "max.u32 %d0, %a0, %a1;": lambda a, b, c: max(a, b),
    "abs.s32 %d0, %a0;": lambda a, b, c: abs(s(a)),
    "neg.s32 %d0, %a0;": lambda a, b, c: -a,
    "shl.b32 %d0, %a0, %a2;": lambda a, b, c: a << c if c < 32 else 0,
    "shr.u32 %d0, %a0, %a2;": lambda a, b, c: a >> c if c < 32 else 0,
    "shr.s32 %d0, %a0, %a2;": lambda a, b, c: s(a) >> min(c, 31),
    "shf.l.wrap.b32 %d0, %a0, %a1, %a2;": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.clamp.b32 %d0, %a0, %a1, %a2;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "lop3.b32 %d0, %a0, %a1, %a2, 0x1B;": lambda a, b, c: sum(
        ((0x1B >> (((a >> k & 1) << 2) | ((b >> k & 1) << 1) | (c >> k & 1))) & 1) << k
        for k in range(32)
    ),
    "prmt.b32 %d0, %a0, %a1, %a2;": prmt,
    "prmt.b32 %d0, %a0, %a1, 0x7632;": lambda a, b, c: prmt(a, b, 0x7632),
    "prmt.b32 %d0, %a0, %a1, 0x9180;": lambda a, b, c: prmt(a, b, 0x9180),
    "bfe.u32 %d0, %a0, %a2, %a1;": lambda a, b, c: bfe(a, c, b, False),
    "bfe.s32 %d0, %a0, %a2, %a1;": lambda a, b, c: bfe(a, c, b, True),
    "bfi.b32 %d0, %a0, %a1, %a2, 9;": lambda a, b, c: bfi(a, b, c, 9),
    "bfind.u32 %d0, %a0;": lambda a, b, c: a.bit_length() - 1,
    "clz.b32 %d0, %a0;": lambda a, b, c: 32 - a.bit_length(),
    "popc.b32 %d0, %a0;": lambda a, b, c: bin(a).count("1"),
    "brev.b32 %d0, %a0;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "sad.s32 %d0, %a0, %a1, %a2;": lambda a, b, c: abs(s(a) - s(b)) + c,
    "add.sat.s32 %d0, %a0, %a1;": lambda a, b, c: max(-(2**31), min(2**31 - 1, s(a) + s(b))),
    "not.b32 %d0, %a0;": lambda a, b, c: ~a,
    "cnot.b32 %d0, %a0;": lambda a, b, c: int(a == 0),
    "cvt.s32.s8 %d0, %a0;": lambda a, b, c: (a & 255) - 256 * (a >> 7 & 1),
    "cvt.u32.u16 %d0, %a0;": lambda a, b, c: a & 0xFFFF,
    "cvt.sat.u8.s32 %d0, %a0;": lambda a, b, c: max(0, min(255, s(a))),
    "cvt.pack.sat.s16.s32 %d0, %a0, %a1;": lambda a, b, c: (
        (max(-32768, min(32767, s(a))) & 0xFFFF) << 16 | max(-32768, min(32767, s(b))) & 0xFFFF
    ),
    "{ .reg .pred p; setp.lt.s32 p, %a0, %a1; selp.b32 %d0, %a0, %a2, p; }": lambda a, b, c: (
        a if s(a) < s(b) else c
    ),
    "{ .reg .pred p, q; setp.gt.u32 q, %a2, 5; setp.le.u32.and p, %a0, %a1, q; selp.b32 %d0, 1, 0, p; }": lambda a, b, c: (
        int(a <= b and c > 5)
    ),
    "{ .reg .pred p, q; setp.eq.u32 p|q, %a0, %a1; selp.b32 %d0, 3, 4, q; }": lambda a, b, c: (
        3 if a != b else 4
    ),
    "{ .reg .pred p; setp.ne.s32 p, %a0, 0; mov.b32 %d0, %a1; @p mov.b32 %d0, %a2; @!p add.u32 %d0, %d0, 1; }": lambda a, b, c: (
        c if a else b + 1
    ),
    "set.lt.u32.s32 %d0, %a0, %a1;": lambda a, b, c: 0xFFFFFFFF if s(a) < s(b) else 0,
    "slct.u32.s32 %d0, %a0, %a1, %a2;": lambda a, b, c: a if s(c) >= 0 else b,
    "{ .reg .b16 x, y; mov.b32 {x, y}, %a0; mov.b32 %d0, {y, x}; }": lambda a, b, c: (
        (a >> 16) | (a << 16)
    ),
    "dp2a.lo.s32.u32 %d0, %a0, %a1, %a2;": lambda a, b, c: (
        c + sum((((a >> 16 * k & 0xFFFF) ^ 0x8000) - 0x8000) * (b >> 8 * k & 255) for k in (0, 1))
    ),
}


@pytest.mark.parametrize("body", list(INT))
def test_integer(body):
    got = run(body, U)
    for k in range(32):
        want = INT[body](*(int(x[k]) for x in U))
        if want is not None:
            assert int(got[k]) == want & 0xFFFFFFFF, (body, k, [hex(x[k]) for x in U])


def test_carry_chain():
    a, b = (rng.integers(0, 2**64, 32, dtype="u8") for _ in range(2))
    body = (
        "{ .reg .b32 x0,x1,y0,y1; mov.b64 {x0,x1}, %a0; mov.b64 {y0,y1}, %a1;"
        "add.cc.u32 x0, x0, y0; addc.u32 x1, x1, y1; mov.b64 %d0, {x0,x1}; }"
    )
    assert np.array_equal(run(body, [a, b], 8), a + b)
    body = body.replace("add.cc", "sub.cc").replace("addc", "subc")
    assert np.array_equal(run(body, [a, b], 8), a - b)


def test_wide():
    a, b = (x.astype("u8") for x in U[:2])
    got = run("mul.wide.u32 %d0, %a0, %a1;", U[:2], 8)
    assert np.array_equal(got, a * b)
    got = run("{ .reg .b64 c; cvt.u64.u32 c, %a1; mad.wide.s32 %d0, %a0, %a1, c; }", U[:2], 8)
    assert np.array_equal(
        got.view("i8"), U[0].view("i4").astype("i8") * U[1].view("i4") + b.view("i8")
    )


F = [
    np.concatenate(
        [
            np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 65504, 1e-8, 3.5, 2.5, -2.5], "f4"),
            rng.normal(0, 10, 20).astype("f4"),
        ]
    ),
    rng.normal(0, 3, 32).astype("f4"),
    rng.normal(0, 3, 32).astype("f4"),
]
f8 = [x.astype("f8") for x in F]
FLOAT = {
    "add.rn.f32 %d0, %a0, %a1;": lambda: F[0] + F[1],
    "sub.f32 %d0, %a0, %a1;": lambda: F[0] - F[1],
    "mul.f32 %d0, %a0, %a1;": lambda: F[0] * F[1],
    "fma.rn.f32 %d0, %a0, %a1, %a2;": lambda: (f8[0] * f8[1] + f8[2]).astype("f4"),
    "div.rn.f32 %d0, %a0, %a1;": lambda: F[0] / F[1],
    "min.f32 %d0, %a0, %a1;": lambda: np.fmin(F[0], F[1]),
    "max.NaN.f32 %d0, %a0, %a1;": lambda: np.maximum(F[0], F[1]),
    "abs.f32 %d0, %a0;": lambda: np.abs(F[0]),
    "neg.f32 %d0, %a0;": lambda: -F[0],
    "sqrt.rn.f32 %d0, %a0;": lambda: np.sqrt(F[0]),
    "rcp.approx.ftz.f32 %d0, %a0;": lambda: np.float32(1) / F[0],
    "rsqrt.approx.f32 %d0, %a0;": lambda: (1 / np.sqrt(f8[0])).astype("f4"),
    "ex2.approx.ftz.f32 %d0, %a1;": lambda: np.exp2(F[1]),
    "lg2.approx.f32 %d0, %a0;": lambda: np.log2(F[0]),
    "tanh.approx.f32 %d0, %a0;": lambda: np.tanh(F[0]),
    "add.sat.f32 %d0, %a1, %a2;": lambda: np.clip(F[1] + F[2], 0, 1),
    "cvt.rni.f32.f32 %d0, %a0;": lambda: np.rint(F[0]),
    "copysign.f32 %d0, %a1, %a0;": lambda: np.copysign(F[0], F[1]),
}


@pytest.mark.parametrize("body", list(FLOAT))
def test_float(body):
    with np.errstate(all="ignore"):
        want = FLOAT[body]()
    got = run(body, F).view("f4")
    assert np.allclose(got, want, rtol=3e-7, atol=0, equal_nan=True)


def test_float_to_int():
    x = np.concatenate(
        [F[0][:12], np.array([3e9, -3e9, 1e20, 0.5, 1.5, -0.5, 7.99, -7.99], "f4"), F[1][:12]]
    )
    x8 = np.nan_to_num(x.astype("f8"), nan=0.0)

    def ref(f, lo, hi):
        return np.clip(f(x8), lo, hi)

    for mode, f in (("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)):
        assert np.array_equal(
            run(f"cvt.{mode}.s32.f32 %d0, %a0;", [x]).view("i4"),
            ref(f, -(2**31), 2**31 - 1).astype("i4"),
        )
        assert np.array_equal(
            run(f"cvt.{mode}.u32.f32 %d0, %a0;", [x]), ref(f, 0, 2**32 - 1).astype("u4")
        )
    assert np.array_equal(
        run("cvt.rn.f32.s32 %d0, %a0;", U[:1]).view("f4"), U[0].view("i4").astype("f4")
    )


def test_compare_nan():
    a, b = F[0].copy(), F[1].copy()
    b[:3] = a[:3]
    b[10] = np.nan
    for cmp, f in (
        ("lt", lambda: a < b),
        ("geu", lambda: ~(a < b)),
        ("neu", lambda: ~(a == b)),
        ("ne", lambda: (a < b) | (a > b)),
        ("nan", lambda: np.isnan(a) | np.isnan(b)),
        ("equ", lambda: ~((a < b) | (a > b))),
        ("ge", lambda: a >= b),
    ):
        got = run(
            f"{{ .reg .pred p; setp.{cmp}.f32 p, %a0, %a1; selp.b32 %d0, 1, 0, p; }}",
            [a, b],
        )
        assert np.array_equal(got, f().astype("u4")), cmp


def test_half_and_bfloat():
    torch = pytest.importorskip("torch")
    x = rng.normal(0, 5, (3, 64)).astype("f4")
    h = x.astype("f2")
    hw = [np.ascontiguousarray(v).view("u4") for v in h]
    for body, want in (
        ("add.f16x2 %d0, %a0, %a1;", h[0] + h[1]),
        ("mul.rn.f16x2 %d0, %a0, %a1;", h[0] * h[1]),
        ("fma.rn.f16x2 %d0, %a0, %a1, %a2;", (h[0].astype("f8") * h[1] + h[2]).astype("f2")),
        ("max.f16x2 %d0, %a0, %a1;", np.maximum(h[0], h[1])),
        ("neg.f16x2 %d0, %a0;", -h[0]),
        ("ex2.approx.f16x2 %d0, %a1;", np.exp2(h[1])),
    ):
        got = run(body, hw).view("f2")
        assert np.allclose(got.astype("f4"), want.astype("f4"), rtol=2e-3), body
    t = [torch.from_numpy(v).bfloat16() for v in x]
    bw = [v.view(torch.int16).numpy().view("u4") for v in t]

    def bits(v):
        return v.bfloat16().view(torch.int16).numpy().view("u4")

    d = [v.double() for v in t]
    for body, want in (
        ("add.rn.bf16x2 %d0, %a0, %a1;", t[0] + t[1]),
        ("mul.rn.bf16x2 %d0, %a0, %a1;", t[0] * t[1]),
        ("fma.rn.bf16x2 %d0, %a0, %a1, %a2;", d[0] * d[1] + d[2]),
        ("min.bf16x2 %d0, %a0, %a1;", torch.minimum(t[0], t[1])),
        ("abs.bf16x2 %d0, %a0;", t[0].abs()),
    ):
        assert np.array_equal(run(body, bw), bits(want)), body
    a, b = x[0][:32].copy(), x[1][:32].copy()
    got = run("cvt.rn.bf16x2.f32 %d0, %a0, %a1;", [a, b])
    assert np.array_equal(
        got & 0xFFFF, torch.from_numpy(b).bfloat16().view(torch.int16).numpy().view("u2")
    )
    assert np.array_equal(
        got >> 16, torch.from_numpy(a).bfloat16().view(torch.int16).numpy().view("u2")
    )
    got = run("cvt.rn.f16x2.f32 %d0, %a0, %a1;", [a, b])
    assert np.array_equal((got & 0xFFFF).astype("u2").view("f2"), b.astype("f2"))
    for f, ty in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        got = run(
            f"{{ .reg .b16 z; cvt.rn.satfinite.{f}x2.f32 z, %a0, %a1; cvt.u32.u16 %d0, z; }}",
            [a, b],
        )
        want = torch.from_numpy(b).to(ty).view(torch.uint8).numpy()
        assert np.array_equal(got & 255, want)
        back = run(f"{{ .reg .b16 z; cvt.u16.u32 z, %a0; cvt.rn.f16x2.{f}x2 %d0, z; }}", [got])
        assert np.array_equal(
            (back & 0xFFFF).astype("u2").view("f2").astype("f4"),
            torch.from_numpy(b).to(ty).float().numpy(),
        )


# ---------------------------------------------------------------- tensor cores
def test_packed_f32x2():
    x = rng.normal(size=(3, 64)).astype("f4")
    got = run("fma.rn.f32x2 %d0, %a0, %a1, %a2;", [v.view("u8") for v in x], 8).view("f4")
    assert np.allclose(got, x[0].astype("f8") * x[1] + x[2], rtol=1e-6, atol=1e-6)


def test_half_predicates():
    x = rng.normal(size=(2, 64)).astype("f2")
    body = (
        "{ .reg .pred p, q; .reg .b32 x, y; setp.lt.f16x2 p|q, %a0, %a1; selp.b32 x, 1, 0, p;"
        "selp.b32 y, 2, 0, q; or.b32 %d0, x, y; }"
    )
    got = run(body, [v.view("u4") for v in x])
    lt = (x[0] < x[1]).reshape(32, 2)
    assert np.array_equal(got, lt[:, 0] + 2 * lt[:, 1])


def test_bank_conflict_counts():
    def waves(stride, width=4):
        t = {4: "b32", 8: "v2.b32", 16: "v4.b32"}[width]
        v = {4: "%x", 8: "{%x,%x}", 16: "{%x,%x,%x,%x}"}[width]
        body = f"mov.u32 %m, sm; mad.lo.u32 %m, %t, {stride}, %m; mov.u32 %x, 1; st.shared.{t} [%m], {v}; mov.b32 %d0, 0;"
        text = (
            HEAD
            + ".visible .entry k() { .shared .align 16 .b8 sm[16384]; .reg .b32 %t, %m, %x, %d0;"
            "mov.u32 %t, %tid.x;" + body + " ret; }"
        )
        return ptxsim.Module.from_ptx(text).launch("k", 1, 32, []).shared_wavefronts

    assert [waves(4), waves(8), waves(128), waves(132), waves(0)] == [1, 2, 32, 1, 1]
    assert [waves(8, 8), waves(16, 8), waves(16, 16), waves(128, 16)] == [2, 4, 4, 32]


def test_coalescing_counts():
    def sectors(stride):
        text = (
            HEAD + ".visible .entry k(.param .u64 p) { .reg .b64 %p, %q; .reg .b32 %t;"
            f"mov.u32 %t, %tid.x; ld.param.u64 %p, [p]; mad.wide.u32 %q, %t, {stride}, %p;"
            "st.global.b32 [%q], %t; ret; }"
        )
        return (
            ptxsim.Module.from_ptx(text).launch("k", 1, 32, [np.zeros(4096, "u1")]).global_sectors
        )

    assert [sectors(4), sectors(8), sectors(32), sectors(128)] == [4, 8, 32, 32]


def test_special_registers_and_grid():
    text = (
        HEAD + ".visible .entry k(.param .u64 p) { .reg .b64 %p, %q; .reg .b32 %a<9>;"
        "mov.u32 %a0, %ctaid.y; mov.u32 %a1, %nctaid.x; mov.u32 %a2, %ctaid.x; mad.lo.u32 %a0, %a0, %a1, %a2;"
        "mov.u32 %a3, %ntid.x; mov.u32 %a4, %ntid.y; mul.lo.u32 %a5, %a3, %a4; mov.u32 %a6, %tid.y;"
        "mov.u32 %a7, %tid.x; mad.lo.u32 %a6, %a6, %a3, %a7; mad.lo.u32 %a6, %a0, %a5, %a6;"
        "ld.param.u64 %p, [p]; mad.wide.u32 %q, %a6, 4, %p; mov.u32 %a8, %laneid; st.global.b32 [%q], %a8; ret; }"
    )
    o = np.zeros(6 * 40, "u4")
    ptxsim.Module.from_ptx(text).launch("k", (3, 2), (8, 5), [o])
    assert np.array_equal(o, np.tile(np.arange(40) % 32, 6))
