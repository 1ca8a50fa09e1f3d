"""Floating-point arithmetic and conversions, as numpy functions of 32-lane vectors."""

import numpy as np

U1, S1, U2, S2, F2 = np.uint8, np.int8, np.uint16, np.int16, np.float16
U4, S4, F4, U8, S8, F8 = np.uint32, np.int32, np.float32, np.uint64, np.int64, np.float64
ALL, NONE = b"\x01" * 32, b"\x00" * 32
LANES = np.arange(32, dtype=np.uint32)
where, ascont = np.where, np.ascontiguousarray
_c16 = np.full(32, 16, U4)
_c16x, _c1x, _c7fff = (
    np.full((32, 2), 16, U4),
    np.full((32, 2), 1, U4),
    np.full((32, 2), 0x7FFF, U4),
)


# ---------------------------------------------------------------- floats
def bf2f(u):
    """bf16 bits -> f32."""
    return (u.astype(U4) << U4(16)).view(F4)


def f2bf(x, mode="rn"):
    """f32 (or f64) -> bf16 bits."""
    x = np.asarray(x)
    if x.dtype == F8:
        x = round_odd(x)
    u = ascont(x).view(U4)
    nan = np.isnan(x)
    if mode == "rz":
        r = u >> U4(16)
    else:
        r = (u + (U4(0x7FFF) + ((u >> U4(16)) & U4(1)))) >> U4(16)
    r = r.astype(U2)
    if nan.any():
        r = np.where(nan, U2(0x7FFF), r)
    return r


def f2bf2(lo, hi, mode="rn"):
    """Two f32 vectors -> packed bf16x2 words."""
    x = np.empty((32, 2), F4)
    x[:, 0] = lo
    x[:, 1] = hi
    u = x.view(U4)
    if mode == "rz":
        r = u >> _c16x
    else:
        r = (u + (_c7fff + ((u >> _c16x) & _c1x))) >> _c16x
    r = r.astype(U2)
    nan = x != x
    if b"\1" in nan.tobytes():
        r[nan] = 0x7FFF
    return r.view(U4).reshape(32)


def round_odd(x):
    """f64 -> f32 with round-to-odd, so that a second rounding is exact."""
    with np.errstate(all="ignore"):
        y = x.astype(F4)
        d = y.astype(F8)
        u = y.view(U4).copy()
        inexact = (d != x) & np.isfinite(x) & np.isfinite(y)
        big = inexact & (np.abs(d) > np.abs(x))
        u[big] -= U4(1)
        u[inexact] |= U4(1)
        ovf = np.isfinite(x) & ~np.isfinite(y)
        u[ovf] = (u[ovf] & U4(0x80000000)) | U4(0x7F7FFFFF)
        return u.view(F4)


def fma4(a, b, c):
    """f32 fused multiply-add through f64."""
    t = np.multiply(a, b, dtype=F8)
    t += c
    return t.astype(F4)


def fma2(a, b, c):
    """f16 fused multiply-add."""
    return (a.astype(F8) * b + c).astype(F2)


def fmabf(a, b, c):
    """bf16 fused multiply-add on bit patterns."""
    return f2bf(bf2f(a).astype(F8) * bf2f(b) + bf2f(c))


def fma8(a, b, c):
    """f64 fused multiply-add (through long double where the platform has it)."""
    L = np.longdouble
    return (a.astype(L) * b.astype(L) + c.astype(L)).astype(F8)


def round_mode(x, mode):
    """Round f64 values to f32 in a directed mode."""
    y = x.astype(F4)
    d = y.astype(F8)
    if mode == "rz":
        fix = np.abs(d) > np.abs(x)
        return np.where(fix, np.nextafter(y, F4(0)), y)
    if mode == "rm":
        return np.where(d > x, np.nextafter(y, F4(-np.inf)), y)
    if mode == "rp":
        return np.where(d < x, np.nextafter(y, F4(np.inf)), y)
    return y


def ftz(x):
    """Flush f32 subnormals to signed zero."""
    return np.where(np.abs(x) < F4(1.1754944e-38), np.copysign(F4(0), x), x)


def sat(x):
    """Clamp to [0, 1]; NaN becomes 0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1).astype(x.dtype))


def fmin(a, b):
    """IEEE minNum with -0 < +0."""
    r = np.fmin(a, b)
    z = (a == 0) & (b == 0)
    if z.any():
        r = np.where(z & (np.signbit(a) | np.signbit(b)), r.dtype.type(-0.0), r)
    return r


def fmax(a, b):
    """IEEE maxNum with -0 < +0."""
    r = np.fmax(a, b)
    return r


def xorsign(a, b, r):
    u = {4: U4, 2: U2}[r.dtype.itemsize]
    s = u(1) << u(8 * r.dtype.itemsize - 1)
    sign = (a.view(u) ^ b.view(u)) & s
    return ((np.abs(r).view(u)) | sign).view(r.dtype)


def f2i(x, kind, mode, satur=True):
    """float -> integer with rounding and saturation; NaN gives 0."""
    x = x.astype(F8) if x.dtype != F8 else x
    x = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode](x)
    info = np.iinfo(kind)
    nan = np.isnan(x)
    lo, hi = float(info.min), float(info.max)
    over = x >= hi if info.bits == 64 else x > hi
    under = x < lo
    bad = nan | over | under
    r = np.where(bad, 0.0, x)
    r = r.astype(kind)
    if bad.any():
        r = np.where(over, info.max, np.where(under, info.min, r)).astype(kind)
    return r


def frint(x, mode):
    return {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode](x)


def isat(x, kind):
    """Integer -> integer with saturation."""
    i = np.iinfo(kind)
    j = np.iinfo(x.dtype)
    return np.clip(x, max(i.min, j.min), min(i.max, j.max)).astype(kind)


def to_tf32(x, mode="rna"):
    """f32 -> tf32 bits (10-bit mantissa)."""
    u = ascont(x).view(U4)
    if mode == "rz":
        r = u & U4(0xFFFFE000)
    elif mode == "rn":
        r = (u + (U4(0xFFF) + ((u >> U4(13)) & U4(1)))) & U4(0xFFFFE000)
    else:
        r = (u + U4(0x1000)) & U4(0xFFFFE000)
    return np.where(np.isfinite(x), r, u)


def f2h_rz(x):
    """f32 -> f16 bits, rounding toward zero."""
    y = x.astype(F2)
    fix = np.abs(y.astype(F8)) > np.abs(x.astype(F8))
    return np.where(fix, np.nextafter(y, F2(0)), y).view(U2)


def pack2(lo, hi):
    """Two u16 vectors -> one u32 vector."""
    return lo.astype(U4) | (hi.astype(U4) << _c16)


def _fp8_table(fmt):
    out = np.zeros(256, F4)
    for i in range(256):
        s = i >> 7
        e, m = ((i >> 3) & 15, i & 7) if fmt == "e4m3" else ((i >> 2) & 31, i & 3)
        if fmt == "e4m3":
            if e == 15 and m == 7:
                v = np.nan
            elif e == 0:
                v = m / 8 * 2.0**-6
            else:
                v = (1 + m / 8) * 2.0 ** (e - 7)
        else:
            if e == 31:
                v = np.inf if m == 0 else np.nan
            elif e == 0:
                v = m / 4 * 2.0**-14
            else:
                v = (1 + m / 4) * 2.0 ** (e - 15)
        out[i] = -v if s else v
    return out


FP8 = {"e4m3": _fp8_table("e4m3"), "e5m2": _fp8_table("e5m2")}
_FP8_POS = {k: t[: 127 if k == "e4m3" else 124].astype(F8) for k, t in FP8.items()}


def f2fp8(x, fmt, relu=False):
    """f32 -> fp8 bits, round to nearest even, saturating to the largest finite value."""
    x = np.asarray(x, F8)
    if relu:
        x = np.where(np.isnan(x), x, np.maximum(x, 0))
    pos = _FP8_POS[fmt]
    a = np.abs(x)
    hi = np.searchsorted(pos, a).clip(1, len(pos) - 1)
    lo = hi - 1
    dl, dh = a - pos[lo], pos[hi] - a
    pick = np.where((dh < dl) | ((dh == dl) & (hi % 2 == 0)), hi, lo)
    pick = np.where(a >= pos[-1], len(pos) - 1, pick)
    r = pick.astype(U1) | (np.signbit(x).astype(U1) << U1(7))
    return np.where(np.isnan(x), U1(0x7F), r).astype(U1)


def tanh4(x):
    return np.tanh(x.astype(F8)).astype(F4)


def ex2(x):
    """2**x with subnormal results kept."""
    return np.exp2(x)


def ex2_ftz(x):
    r = np.exp2(x)
    if (r < F4(1.1754944e-38)).any():
        r = np.where(r < F4(1.1754944e-38), F4(0), r)
    return r


_one4 = np.ones(32, F4)


def rcp(x):
    return _one4 / x


def rsqrt(x):
    return (1.0 / np.sqrt(x.astype(F8))).astype(F4)


def lg2(x):
    return np.log2(x)


def sin4(x):
    return np.sin(x.astype(F8)).astype(F4)


def cos4(x):
    return np.cos(x.astype(F8)).astype(F4)


def testp(x, what):
    return {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "notanumber": np.isnan,
        "number": lambda v: ~np.isnan(v),
        "normal": lambda v: np.isfinite(v) & (np.abs(v) >= np.finfo(v.dtype).tiny),
        "subnormal": lambda v: (v != 0) & (np.abs(v) < np.finfo(v.dtype).tiny),
    }[what](x)


def to_q(x):
    r = np.zeros((32, 2), U8)
    r[:, 0] = x.view({1: U1, 2: U2, 4: U4, 8: U8}[x.dtype.itemsize])
    return r


def qpack(lo, hi):
    r = np.empty((32, 2), U8)
    r[:, 0] = lo
    r[:, 1] = hi
    return r
