"""Warp-level tensor-core operations: ldmatrix, stmatrix, movmatrix, mma.sync and wmma.


Products are exact in float32 (or integers); sums run in float32 in an unspecified order,
as on hardware.  f16 accumulators are rounded once per instruction.
"""

import re

import numpy as np

from .access import READ, WRITE, Site
from .emitters import Lazy, op
from .errors import PtxError
from .floats import FP8
from .helpers import F2, F4, S1, S4, U1, U2, U4, U8
from .ops_mem import base_expr
from .syntax import Imm, Reg, Vec

_IDX16 = np.arange(16)


# ---------------------------------------------------------------- operand conversion
def _bf(u2):
    return (u2.astype(U4) << U4(16)).view(F4)


_F16_TABLE = np.arange(65536, dtype=U2).view(F2).astype(F4)
DECODE = {
    "bf16": _bf,
    "f16": lambda u: _F16_TABLE.take(u),
    "e4m3": lambda u: FP8["e4m3"].take(u),
    "e5m2": lambda u: FP8["e5m2"].take(u),
    "s8": lambda u: u.view(S1).astype(F4),
    "u8": lambda u: u.astype(F4),
    "tf32": lambda u: (u & U4(0xFFFFE000)).view(F4),
    "f32": lambda u: u.view(F4),
}
EBYTES = {
    "bf16": 2,
    "f16": 2,
    "e4m3": 1,
    "e5m2": 1,
    "s8": 1,
    "u8": 1,
    "tf32": 4,
    "f32": 4,
    "f64": 8,
}
_UD = {1: U1, 2: U2, 4: U4}


def frag_a(t, *regs):
    """A fragment registers -> (16, K) f32, columns in fragment order.

    ``regs`` come in PTX order a0 (row g), a1 (row g + 8), a2 (row g, upper K half), a3.
    """
    e = 4 // EBYTES[t]
    n = len(regs)
    x = np.concatenate(regs).view(_UD[EBYTES[t]])
    if n == 1:
        return DECODE[t](x).reshape(8, 4 * e)
    x = x.reshape(n // 2, 2, 8, 4 * e)  # (kh, h, g, t e)
    if n == 2:
        return DECODE[t](x).reshape(16, 4 * e)
    return DECODE[t](x.transpose(1, 2, 0, 3).reshape(16, -1))


def frag_b(t, *regs):
    """B fragment registers -> (K, 8) f32, rows in the order of :func:`frag_a` columns."""
    e = 4 // EBYTES[t]
    n = len(regs)
    x = np.concatenate(regs).view(_UD[EBYTES[t]])
    if n == 1:
        return DECODE[t](x.reshape(8, 4 * e)).T
    return DECODE[t](x.reshape(n, 8, 4 * e).transpose(1, 0, 2).reshape(8, -1)).T


def frag_b4(t, x, cross):
    """A whole ldmatrix.x4 result as two B fragments side by side: (K, 16) f32.

    The fragments are matrices (0, 1) and (2, 3), or (0, 2) and (1, 3) if ``cross``.
    """
    x = DECODE[t](x.view(U2)).reshape(2, 2, 8, 8)
    x = x.transpose(1, 2, 0, 3) if cross else x.transpose(0, 2, 1, 3)
    return x.reshape(16, 16).T


def frag_c(*regs):
    """f32 accumulator registers -> (2, 32, 2), i.e. (16, 8) in memory order."""
    x = np.empty((2, 32, 2), regs[0].dtype)
    x[0, :, 0], x[0, :, 1], x[1, :, 0], x[1, :, 1] = regs
    return x.reshape(16, 8)


def frag_ch(r0, r1):
    """f16 accumulators (two packed registers) -> (16, 8) f32."""
    x = np.concatenate((r0, r1)).view(F2).astype(F4)
    return x.reshape(16, 8)


def split_ch(mat):
    """(16, 8) f32 -> two packed f16 registers."""
    h = mat.astype(F2).reshape(2, 64)
    return h[0].view(U4), h[1].view(U4)


def mma_int(a, b, c, satur):
    r = np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64)
    r += c.view(S4).reshape(16, 8)
    if satur:
        r = np.clip(r, -(2**31), 2**31 - 1)
    return r.astype(np.int64).astype(U8).astype(U4)


def split_c(mat):
    x = mat.reshape(2, 32, 2)
    return x[0, :, 0].copy(), x[0, :, 1].copy(), x[1, :, 0].copy(), x[1, :, 1].copy()


def mma_f64(a, b, c0, c1):
    """m8n8k4 f64: one A, one B and two C registers."""
    A = a.reshape(8, 4)
    B = b.reshape(8, 4).T
    C = np.stack((c0, c1), 1).reshape(8, 8)
    D = (A @ B + C).reshape(32, 2)
    return D[:, 0].copy(), D[:, 1].copy()


MMA_ENV = dict(
    frag_a=frag_a,
    frag_b=frag_b,
    frag_b4=frag_b4,
    frag_c=frag_c,
    frag_ch=frag_ch,
    split_ch=split_ch,
    mma_int=mma_int,
    split_c=split_c,
    mma_f64=mma_f64,
    matmul=np.matmul,
)


def require_full_warp(g, i):
    if i.pred:
        g.unsupported(i, "predicated tensor-core instruction")
    s = g.bind("S", g.kc.where_text(i))
    g.emit(f"if m is not None: W.need_full(m, {s})")


# ---------------------------------------------------------------- mma.sync
@op("mma")
def _mma(g, i):
    g.kc.env.update(MMA_ENV)
    shape = next(m for m in i.mods if re.fullmatch(r"m\d+n\d+k\d+", m))
    ty = [
        m
        for m in i.mods
        if m
        in (
            "f16",
            "bf16",
            "f32",
            "tf32",
            "s8",
            "u8",
            "s32",
            "e4m3",
            "e5m2",
            "f64",
            "s4",
            "u4",
            "b1",
        )
    ]
    dt, at, bt, _ct = ty
    if "sp" in i.modset or "block_scale" in i.modset or at in ("s4", "u4", "b1"):
        g.unsupported(i)
    require_full_warp(g, i)
    D, A, B, C = i.ops[:4]
    if at == "f64":
        if shape != "m8n8k4":
            g.unsupported(i)
        a, b = g.src(A.items[0], "f8"), g.src(B.items[0], "f8")
        c = [g.src(x, "f8") for x in C.items]
        t = g.tmp()
        g.emit(f"{t} = mma_f64({a}, {b}, {', '.join(c)})")
        for k, x in enumerate(D.items):
            g.dst(i, x, "f8", f"{t}[{k}]")
        return
    if not shape.startswith("m16n8"):
        g.unsupported(i, "mma shape")

    def conv(tag, t, ops):
        key = (tag, t, *g.key(*ops))
        v = g.cse.get(key)
        if v is None:
            v = g.tmp()
            g.emit(f"{v} = {tag}({t!r}, {', '.join(g.src(x, 'u4') for x in ops)})")
            g.cse[key] = v
        return v

    a = conv("frag_a", at, A.items)
    both = _ldmatrix_pair(g, bt, B.items) if dt == "f32" else None
    b = None if both else conv("frag_b", bt, B.items)
    if dt == "s32":
        c = [g.src(x, "u4") for x in C.items]
        r = g.tmp()
        g.emit(
            f"{r} = split_c(mma_int({a}, {b}, frag_c({', '.join(c)}), {'satfinite' in i.modset}))"
        )
        for k, x in enumerate(D.items):
            g.dst(i, x, "u4", f"{r}[{k}]")
        return
    if dt == "f16":
        c = [g.src(x, "u4") for x in C.items]
        r = g.tmp()
        g.emit(f"{r} = split_ch({a} @ {b} + frag_ch({c[0]}, {c[1]}))")
        for k, x in enumerate(D.items):
            g.dst(i, x, "u4", f"{r}[{k}]")
        return
    lz = [g.have.get(x.name) if isinstance(x, Reg) else None for x in C.items]
    if all(isinstance(x, Imm) and x.value == 0 for x in C.items) or all(
        g.imm_of(x) == 0 for x in C.items
    ):
        c = None
    elif (
        all(isinstance(x, Lazy) for x in lz)
        and len({x.mat for x in lz}) == 1
        and [(x.h, x.e) for x in lz] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    ):
        c = lz[0].mat
    else:
        c = g.tmp()
        g.emit(f"{c} = frag_c({', '.join(g.src(x, 'f4') for x in C.items)})")
    r = g.tmp()
    if both:
        bvar, part = both
        key = ("matmul", a, bvar)
        if key not in g.cse:
            g.cse[key] = g.tmp()
            g.emit(f"{g.cse[key]} = matmul({a}, {bvar})")
        g.emit(f"{r} = {g.cse[key]}[:, {8 * part}:{8 * part + 8}]" + (f" + {c}" if c else ""))
    else:
        g.emit(f"{r} = matmul({a}, {b})")
        if c:
            g.emit(f"{r} += {c}")
    for k, x in enumerate(D.items):
        if isinstance(x, Reg):
            g.set_local(x.name, Lazy(r, k >> 1, k & 1))


def _ldmatrix_pair(g, t, regs):
    """(variable, 0 or 1) when two B registers come straight from one ldmatrix.x4."""
    if len(regs) != 2 or EBYTES[t] != 2:
        return None
    pr = [g.prov.get(x.name) if isinstance(x, Reg) else None for x in regs]
    if (
        None in pr
        or pr[0][0] != pr[1][0]
        or any(p[2] != g.ver.get(x.name) for p, x in zip(pr, regs))
    ):
        return None
    ij = (pr[0][1], pr[1][1])
    if ij not in ((0, 1), (2, 3), (0, 2), (1, 3)):
        return None
    cross = ij in ((0, 2), (1, 3))
    key = ("frag_b4", t, pr[0][0], cross)
    if key not in g.cse:
        g.cse[key] = g.tmp()
        g.emit(f"{g.cse[key]} = frag_b4({t!r}, {pr[0][0]}, {cross})")
    return g.cse[key], {0: 0, 2: 1, 1: 1}[ij[0]]


# ---------------------------------------------------------------- ldmatrix and friends
@op("ldmatrix")
def _ldmatrix(g, i):
    n = next(int(m[1:]) for m in i.mods if re.fullmatch(r"x[124]", m))
    if "m8n8" not in i.modset or "b16" not in i.modset:
        g.unsupported(i)
    require_full_warp(g, i)
    base, off = (
        base_expr(g, i.ops[1], "shared")
        if _sp(i) == "shared"
        else (_generic_shared(g, i.ops[1]), i.ops[1].off)
    )
    site = Site(g.kc, i, "shared", 4, 4, off)
    site.ldm = n
    f = g.bind("ldm", make_ldmatrix(site, n, "trans" in i.modset))
    r = g.tmp()
    g.emit(f"{r} = {f}(W, {base})")
    items = i.ops[0].items if isinstance(i.ops[0], Vec) else (i.ops[0],)
    for k, x in enumerate(items):
        g.dst(i, x, "u4", f"{r}[{k}]")
        if n == 4 and isinstance(x, Reg):
            g.prov[x.name] = (r, k, g.ver[x.name])


def _sp(i):
    return "shared" if any(m.startswith("shared") for m in i.mods) else "generic"


def _generic_shared(g, a):
    return f"{g.src(a.base, 'u8')}.astype(U4)"


def make_ldmatrix(site, n, trans):
    """Closure loading n 8x8 b16 matrices; row addresses come from lanes 0..8n-1."""
    index = site.shared_index()
    lanes = np.zeros(32, bool)
    lanes[: 8 * n] = True
    lm = None if n == 4 else lanes
    key = (4, 4)

    def ld(W, addr):
        cta = W.cta
        ix = index(cta, addr)
        if n != 4:
            ix = ix[: 8 * n]
        try:
            v = cta.srows[key].take(ix, 0)
        except IndexError:
            site.shared_fault(W, addr, lm)
            raise PtxError(f"ldmatrix from another CTA at {site.where}") from None
        if W.check:
            if b"\0" in cta.svalid[key].take(ix, 0).tobytes():
                site.raise_uninit(W, cta, addr, lm)
            W.log.append((site, ix, READ))
        if site.metrics:
            site.note(addr, lm)
        if trans:
            x = v.view(U2).reshape(n, 8, 8).transpose(0, 2, 1)
            return np.ascontiguousarray(x).view(U4).reshape(n, 32)
        return v.reshape(n, 32)

    return ld


@op("stmatrix")
def _stmatrix(g, i):
    n = next(int(m[1:]) for m in i.mods if re.fullmatch(r"x[124]", m))
    if "m8n8" not in i.modset:
        g.unsupported(i)
    require_full_warp(g, i)
    base, off = (
        base_expr(g, i.ops[0], "shared")
        if _sp(i) == "shared"
        else (_generic_shared(g, i.ops[0]), i.ops[0].off)
    )
    site = Site(g.kc, i, "shared", 4, 4, off, True)
    f = g.bind("stm", make_stmatrix(site, n, "trans" in i.modset))
    items = i.ops[1].items if isinstance(i.ops[1], Vec) else (i.ops[1],)
    g.emit(f"{f}(W, {base}, {', '.join(g.src(x, 'u4') for x in items)})")


def make_stmatrix(site, n, trans):
    index = site.shared_index()
    lanes = np.zeros(32, bool)
    lanes[: 8 * n] = True
    lm = None if n == 4 else lanes
    key = (4, 4)

    def st(W, addr, *regs):
        cta = W.cta
        ix = index(cta, addr)[: 8 * n]
        x = np.concatenate(regs)
        if trans:
            x = np.ascontiguousarray(x.view(U2).reshape(n, 8, 8).transpose(0, 2, 1)).view(U4)
        x = x.reshape(8 * n, 4)
        try:
            cta.srows[key][ix] = x
        except IndexError:
            site.shared_fault(W, addr, lm)
            raise PtxError(f"stmatrix to another CTA at {site.where}") from None
        if W.check:
            cta.svalid[key][ix] = U4(0x01010101)
            W.log.append((site, ix, WRITE))
        if site.metrics:
            site.note(addr, lm)

    return st


@op("movmatrix")
def _movmatrix(g, i):
    require_full_warp(g, i)
    v = g.src(i.ops[1], "u4")
    g.dst(i, i.ops[0], "u4", f"ascont({v}.view(U2).reshape(8, 8).T).view(U4).reshape(32)")


# ---------------------------------------------------------------- wmma
def wmma_load(W, ld, es, base, stride, rows, cols, colmajor, nregs):
    """Load a wmma fragment.  PTX leaves the layout open; here lane l holds elements
    l*E .. l*E+E-1 of the row-major matrix, and surplus registers are zero."""
    n = rows * cols // 32
    k = np.arange(32)[:, None] * n + np.arange(n)
    r, c = k // cols, k % cols
    st = int(stride[0])
    off = ((c * st + r) if colmajor else (r * st + c)) * es
    out = np.zeros((32, nregs * 4 // es), {1: U1, 2: U2, 4: U4}[es])
    for e in range(n):
        out[:, e] = ld(W, base + off[:, e].astype(base.dtype), None)
    return np.ascontiguousarray(out.view(U4).T)


def wmma_store(W, st_, es, base, stride, rows, cols, colmajor, regs):
    n = rows * cols // 32
    k = np.arange(32)[:, None] * n + np.arange(n)
    r, c = k // cols, k % cols
    st = int(stride[0])
    off = ((c * st + r) if colmajor else (r * st + c)) * es
    x = np.ascontiguousarray(np.array(regs).T).view({2: U2, 4: U4}[es])
    for e in range(n):
        st_(W, base + off[:, e].astype(base.dtype), None, np.ascontiguousarray(x[:, e]))


def wmma_mat(regs, rows, cols, ty):
    """Fragment registers -> (rows, cols) f32."""
    eb = EBYTES.get(ty, 4)
    x = np.ascontiguousarray(np.array(regs).T).view({1: U1, 2: U2, 4: U4}[eb])
    x = np.ascontiguousarray(x[:, : rows * cols // 32]).reshape(rows, cols)
    if ty == "s32":
        return x.view(S4).astype(np.float64)
    return DECODE[ty](x)


def wmma_mma(a, b, c, m, n, k, at, bt, ct, dt):
    d = wmma_mat(a, m, k, at) @ wmma_mat(b, k, n, bt) + wmma_mat(c, m, n, ct)
    if dt == "s32":
        x = d.astype(np.int64).astype(S4).view(U4)
    elif dt == "f16":
        x = d.astype(F2).reshape(32, -1).view(U4)
    else:
        x = d.astype(F4).view(U4)
    return np.ascontiguousarray(x.reshape(32, -1).T)


@op("wmma")
def _wmma(g, i):
    g.kc.env.update(MMA_ENV, wmma_load=wmma_load, wmma_store=wmma_store, wmma_mma=wmma_mma)
    require_full_warp(g, i)
    shape = next(m for m in i.mods if re.fullmatch(r"m\d+n\d+k\d+", m))
    m, n, k = map(int, re.findall(r"\d+", shape))
    types = [x for x in i.mods if x in EBYTES or x == "s32"]
    lay = [x for x in i.mods if x in ("row", "col")]
    if "load" in i.modset or "store" in i.modset:
        from .access import Site
        from .ops_mem import _reader, _writer, space_of

        load = "load" in i.modset
        ty = types[0]
        es = EBYTES.get(ty, 4)
        what = next(x for x in i.mods if x in ("a", "b", "c", "d"))
        rows, cols = {"a": (m, k), "b": (k, n), "c": (m, n), "d": (m, n)}[what]
        addr = i.ops[1] if load else i.ops[0]
        frag = (i.ops[0] if load else i.ops[1]).items
        sp = space_of(i)
        base, off = base_expr(g, addr, sp)
        site = Site(g.kc, i, sp, es, 1, off, not load)
        stride = (
            g.src(i.ops[2], "u4")
            if len(i.ops) > 2
            else g.kc.const("u4", cols if lay[0] == "row" else rows)
        )
        f = g.bind("wm", _reader(site, sp) if load else _writer(site, sp))
        args = f"W, {f}, {es}, {base}, {stride}, {rows}, {cols}, {lay[0] == 'col'}"
        if load:
            t = g.tmp()
            g.emit(f"{t} = wmma_load({args}, {len(frag)})")
            for q, x in enumerate(frag):
                g.dst(i, x, "u4", f"{t}[{q}]")
        else:
            g.emit(f"wmma_store({args}, [{', '.join(g.src(x, 'u4') for x in frag)}])")
        return
    D, A, B, C = (o.items for o in i.ops[:4])
    if len(types) == 2:
        dt, ct = types
        at = bt = "f16"
    else:
        dt, at, bt, ct = types
    t = g.tmp()
    v = ["[" + ", ".join(g.src(x, "u4") for x in o) + "]" for o in (A, B, C)]
    g.emit(f"{t} = wmma_mma({', '.join(v)}, {m}, {n}, {k}, {at!r}, {bt!r}, {ct!r}, {dt!r})")
    for q, x in enumerate(D):
        g.dst(i, x, "u4", f"{t}[{q}]")
