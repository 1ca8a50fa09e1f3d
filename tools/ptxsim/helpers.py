"""Numpy helper functions visible to generated code."""

import numpy as np

from . import floats

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


def gmask(p, m):
    """Combine a guard predicate with the active mask; None when all lanes are on."""
    if m is not None:
        p = p & m
    return None if p.tobytes() == ALL else p


def mask_int(m):
    """Lane mask as a Python int."""
    if m is None:
        return 0xFFFFFFFF
    return int.from_bytes(np.packbits(m, bitorder="little").tobytes(), "little")


def int_mask(v):
    """Python int -> bool[32]."""
    return np.unpackbits(
        np.frombuffer(int(v).to_bytes(4, "little"), np.uint8), bitorder="little"
    ).view(np.bool_)


def lanes_of(m):
    """Active lane numbers."""
    return range(32) if m is None else np.flatnonzero(m).tolist()


def full4(v):
    return np.full(32, v & 0xFFFFFFFF, U4)


# ---------------------------------------------------------------- integers
def idiv(a, b):
    """Truncating signed division."""
    with np.errstate(all="ignore"):
        bz = b == 0
        bb = np.where(bz, 1, b).astype(b.dtype)
        q = a // bb
        r = a - q * bb
        q = q + ((r != 0) & ((a < 0) != (bb < 0))).astype(a.dtype)
        return np.where(bz, a.dtype.type(-1), q)


def irem(a, b):
    """Remainder with the sign of the dividend."""
    return a - idiv(a, b) * b


def udiv(a, b):
    bz = b == 0
    q = a // np.where(bz, 1, b).astype(b.dtype)
    return np.where(bz, np.array(-1).astype(a.dtype), q)


def urem(a, b):
    return a - udiv(a, b) * b


def mulhi_u8(a, b):
    """High 64 bits of an unsigned 64x64 product."""
    m = U8(0xFFFFFFFF)
    s = U8(32)
    al, ah, bl, bh = a & m, a >> s, b & m, b >> s
    ll, lh, hl, hh = al * bl, al * bh, ah * bl, ah * bh
    mid = (ll >> s) + (lh & m) + (hl & m)
    return hh + (lh >> s) + (hl >> s) + (mid >> s)


def mulhi_s8(a, b):
    h = mulhi_u8(a.view(U8), b.view(U8)).view(S8)
    return h - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)


def shf(a, b, n, left, wrap):
    """Funnel shift of b:a."""
    n = (n & U4(31)) if wrap else np.minimum(n, U4(32))
    v = (b.astype(U8) << U8(32)) | a
    n = n.astype(U8)
    if left:
        return ((v << n) >> U8(32)).astype(U4)
    return (v >> n).astype(U4)


def prmt(a, b, c, mode=""):
    """Byte permute."""
    x = np.concatenate((ascont(a).view(U1).reshape(32, 4), ascont(b).view(U1).reshape(32, 4)), 1)
    if mode == "":
        sel = np.stack([(c >> U4(4 * i)) & U4(15) for i in range(4)], 1)
    else:
        n = c & U4(3)
        tab = {
            "f4e": [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]],
            "b4e": [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]],
            "rc8": [[0] * 4, [1] * 4, [2] * 4, [3] * 4],
            "ecl": [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]],
            "ecr": [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]],
            "rc16": [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]],
        }[mode]
        sel = np.array(tab, U4)[n]
    r = np.take_along_axis(x, (sel & U4(7)).astype(np.intp), 1)
    rep = (sel & U4(8)) != 0
    if rep.any():
        r = np.where(rep, np.where(r & U1(0x80), U1(0xFF), U1(0)), r)
    return ascont(r).view(U4).reshape(32)


def bfe(a, pos, ln, signed):
    """Bit-field extract."""
    w = a.dtype.itemsize * 8
    p = (pos & U4(255)).astype(np.int64)
    n = (ln & U4(255)).astype(np.int64)
    out = []
    for x, pp, nn in zip(a.tolist(), p.tolist(), n.tolist()):
        x &= (1 << w) - 1
        if nn == 0:
            out.append(0)
            continue
        v = (x >> pp) & ((1 << nn) - 1) if pp < w else 0
        if signed:
            sb = (x >> min(pp + nn - 1, w - 1)) & 1
            have = max(0, min(nn, w - pp))
            if sb:
                v |= ((1 << w) - 1) & ~((1 << have) - 1)
        out.append(v & ((1 << w) - 1))
    return np.array(out, dtype=U4 if w == 32 else U8).view(a.dtype)


def bfi(a, b, pos, ln):
    """Bit-field insert of a into b."""
    t = b.dtype.type
    w = b.dtype.itemsize * 8
    p = np.minimum(pos & U4(255), U4(w)).astype(b.dtype)
    n = np.minimum(ln & U4(255), U4(w)).astype(b.dtype)
    ones = np.array(-1).astype(b.dtype)
    msk = np.where(n >= w, ones, (t(1) << n) - t(1)) << p
    return (b & ~msk) | ((a << p) & msk)


def clz(a):
    w = a.dtype.itemsize * 8
    return np.array([w - int(x).bit_length() for x in a.tolist()], U4)


def bfind(a, signed, shiftamt):
    w = a.dtype.itemsize * 8
    out = []
    for x in a.tolist():
        if signed and x < 0:
            x = ~x
        x &= (1 << w) - 1
        r = x.bit_length() - 1
        if r >= 0 and shiftamt:
            r = w - 1 - r
        out.append(r & 0xFFFFFFFF)
    return np.array(out, U4)


def brev(a):
    w = a.dtype.itemsize
    b = np.unpackbits(ascont(a).view(U1).reshape(32, w), axis=1, bitorder="little")
    return ascont(np.packbits(b[:, ::-1], axis=1, bitorder="little")).view(a.dtype).reshape(32)


def fns(mask, base, off):
    """Find the n-th set bit."""
    out = []
    for mk, b, o in zip(mask.tolist(), base.tolist(), off.view(S4).tolist()):
        r = 0xFFFFFFFF
        if o == 0:
            r = b if (mk >> b) & 1 else r
        else:
            step, cnt, i = (1, o, b) if o > 0 else (-1, -o, b)
            while 0 <= i < 32:
                if (mk >> i) & 1:
                    cnt -= 1
                    if cnt == 0:
                        r = i
                        break
                i += step
        out.append(r)
    return np.array(out, U4)


def dp4a(a, b, c, sa, sb):
    x = ascont(a).view(S1 if sa else U1).reshape(32, 4).astype(S8)
    y = ascont(b).view(S1 if sb else U1).reshape(32, 4).astype(S8)
    return ((x * y).sum(1) + c.astype(S8)).astype(U8).astype(U4)


def dp2a(a, b, c, sa, sb, hi):
    x = ascont(a).view(S2 if sa else U2).reshape(32, 2).astype(S8)
    y = ascont(b).view(S1 if sb else U1).reshape(32, 4)[:, 2 * hi : 2 * hi + 2].astype(S8)
    return ((x * y).sum(1) + c.astype(S8)).astype(U8).astype(U4)


def vmulw(a, b, k):
    return a.astype(k) * b.astype(k)


# ---------------------------------------------------------------- warp collectives
def lead(m):
    """Lowest active lane."""
    return 0 if m is None else int(m.argmax())


def shfl(v, b, c, mode, m):
    """(values, in-range predicate) of shfl.sync."""
    lane = LANES
    mask = (c >> U4(8)) & U4(31)
    clampv = c & U4(31)
    maxl = (lane & mask) | (clampv & ~mask)
    minl = lane & mask
    b = b & U4(31)
    if mode == "up":
        j = lane.view(S4) - b.view(S4)
        p = j >= maxl.view(S4)
    elif mode == "down":
        j = (lane + b).view(S4)
        p = j <= maxl.view(S4)
    elif mode == "bfly":
        j = (lane ^ b).view(S4)
        p = j <= maxl.view(S4)
    else:
        j = (minl | (b & ~mask)).view(S4)
        p = j <= maxl.view(S4)
    j = np.where(p, j, lane.view(S4))
    return v.take(j), p


def shfl_index(b, c, mode):
    """Static (index, predicate) of shfl.sync with constant b and c."""
    v, p = shfl(
        LANES.copy(), np.full(32, b & 0xFFFFFFFF, U4), np.full(32, c & 0xFFFFFFFF, U4), mode, None
    )
    idx = v.astype(np.intp)
    idx.flags.writeable = False
    p.flags.writeable = False
    return idx, p


def ballot(p, m):
    if m is not None:
        p = p & m
    return int.from_bytes(np.packbits(p, bitorder="little").tobytes(), "little")


def vote(p, m, mode):
    act = 0xFFFFFFFF if m is None else mask_int(m)
    b = ballot(p, m)
    if mode == "all":
        r = b == act
    elif mode == "any":
        r = b != 0
    else:
        r = b == act or b == 0
    return np.full(32, r)


def match_any(v, m):
    out = np.zeros(32, U4)
    vals = v.tolist()
    on = [True] * 32 if m is None else m.tolist()
    groups = {}
    for i in range(32):
        if on[i]:
            groups[vals[i]] = groups.get(vals[i], 0) | (1 << i)
    for i in range(32):
        if on[i]:
            out[i] = groups[vals[i]]
    return out


def match_all(v, m):
    a = v if m is None else v[m]
    ok = bool((a == a[0]).all())
    return np.full(32, mask_int(m) if ok else 0, U4), np.full(32, ok)


def redux(v, m, what, member):
    sel = int_mask(int(member[lead(m)]))
    if m is not None:
        sel = sel & m
    a = v[sel]
    if what == "add":
        r = a.sum(dtype=np.int64 if v.dtype == S4 else np.uint64)
        r = int(r) & 0xFFFFFFFF
        return np.full(32, r, U4).view(v.dtype)
    f = {
        "min": np.min,
        "max": np.max,
        "and": np.bitwise_and.reduce,
        "or": np.bitwise_or.reduce,
        "xor": np.bitwise_xor.reduce,
    }[what]
    return np.full(32, f(a), v.dtype)


ENV = {k: v for k, v in [*vars(floats).items(), *globals().items()] if not k.startswith("__")}
