"""Warp-group tensor-core operations: wgmma and its shared-memory operands.


Products are exact in float32 (or integers); sums run in float32 in an unspecified order,
as on hardware.  f16 accumulators are rounded once per instruction.
"""

import re

import numpy as np

from .access import READ, Site
from .emitters import op
from .helpers import F2, F4, S4, U4
from .memory import SHARED_ORIGIN
from .ops_mma import DECODE, EBYTES, MMA_ENV, frag_a, require_full_warp
from .syntax import Imm, Reg, Vec


# ---------------------------------------------------------------- wgmma
def swizzle_bits(mode):
    """Descriptor swizzle field -> swizzle span in bytes."""
    return {0: 0, 1: 128, 2: 64, 3: 32}[mode]


_layout_cache = {}


def operand_offsets(rows, kbytes, eb, lead, stride, sw, trans):
    """Byte offsets (from the start address, before the swizzle) of a (rows, k) operand tile.

    ``lead`` and ``stride`` are the leading and stride byte offsets.  Core matrices are
    8 x 16 bytes.  K-major: rows are contiguous along K.  MN-major (``trans``): contiguous
    along M/N.
    """
    key = (rows, kbytes, eb, lead, stride, sw, trans)
    r = _layout_cache.get(key)
    if r is not None:
        return r
    k = kbytes // eb
    if not trans:
        rr = np.arange(rows)[:, None]
        kb = (np.arange(k) * eb)[None, :]
        if sw == 0:
            off = (rr // 8) * stride + (rr % 8) * 16 + (kb // 16) * lead + kb % 16
        else:
            off = (rr // 8) * stride + (rr % 8) * sw + kb % sw + (kb // sw) * lead
    else:
        mb = (np.arange(rows) * eb)[:, None]
        kk = np.arange(k)[None, :]
        if sw == 0:
            off = (mb // 16) * stride + mb % 16 + (kk % 8) * 16 + (kk // 8) * lead
        else:
            off = (mb // sw) * lead + mb % sw + (kk % 8) * sw + (kk // 8) * stride
    off = np.ascontiguousarray(off.astype(np.int64))
    _layout_cache[key] = off
    return off


def apply_swizzle(addr, sw):
    """XOR address bits 4.. with bits 7.. as the 32/64/128-byte swizzle does."""
    if sw == 0:
        return addr
    bits = {32: 1, 64: 3, 128: 7}[sw]
    return addr ^ (((addr >> 7) & bits) << 4)


_addr_cache = {}


def operand_index(desc, rows, k, eb, trans, row0, granule):
    """(element indices, granules, lowest, highest byte) of an operand tile; cached."""
    key = (desc, rows, k, eb, trans, row0, granule)
    r = _addr_cache.get(key)
    if r is not None:
        return r
    start = (desc & 0x3FFF) << 4
    lead = ((desc >> 16) & 0x3FFF) << 4
    stride = ((desc >> 32) & 0x3FFF) << 4
    sw = swizzle_bits((desc >> 62) & 3)
    off = operand_offsets(row0 + rows, k * eb, eb, lead, stride, sw, trans)[row0:]
    addr = apply_swizzle(off + start, sw) - SHARED_ORIGIN
    if len(_addr_cache) > 4096:
        _addr_cache.clear()
    r = _addr_cache[key] = (
        addr // eb,
        np.unique(addr // granule),
        int(addr.min()),
        int(addr.max()),
    )
    return r


def read_operand(W, site, desc, rows, k, t, trans, row0=0):
    """Decode a shared-memory matrix descriptor and return the (rows, k) f32 tile."""
    eb = EBYTES[t]
    cta = W.cta
    g = cta.granule
    ix, gr, lo, hi = operand_index(desc, rows, k, eb, trans, row0, g)
    if lo < 0 or hi + eb > cta.smem_size:
        site.fault(
            W,
            0,
            f"wgmma operand outside shared memory: descriptor {desc:#x} covers "
            f"offsets {lo}..{hi} of {cta.smem_size}",
            "out-of-bounds",
        )
    if W.check:
        v = cta.valid_bytes[: cta.smem_size // g * g].reshape(-1, g)
        if b"\0" in v.take(gr, 0).tobytes() and (
            cta.launch.check_uninit
            or cta.pending_bytes[: cta.smem_size // g * g].reshape(-1, g).take(gr, 0).any()
        ):
            site.fault(
                W,
                0,
                "wgmma reads uninitialised shared memory or memory with a pending "
                f"asynchronous copy (descriptor {desc:#x})",
                "uninitialised",
            )
        W.log.append((site, gr, READ, g))
        cta.shadow.proxy_check(W, W.clocks.vc[W.vidx], gr, site)
    return DECODE[t](cta.srows[(eb, 1)].take(ix))


class Accum:
    """A wgmma accumulator tile in flight: 16 rows of this warp by N columns."""

    __slots__ = ("f16", "mat", "n", "pending", "targets")

    def __init__(self, n, f16):
        self.n, self.f16 = n, f16
        self.mat, self.targets, self.pending = None, None, 0


def regs_to_mat(regs, n, f16):
    """Accumulator registers -> (16, n) f32 (or int)."""
    if f16:
        x = np.array(regs).view(F2).astype(F4)  # (n/4, 64): reg = (j, h)
        return x.reshape(n // 8, 2, 8, 8).transpose(1, 2, 0, 3).reshape(16, n)
    x = np.array(regs).reshape(n // 8, 2, 2, 8, 4)  # j, h, e, g, t
    return x.transpose(1, 3, 0, 4, 2).reshape(16, n)


def mat_to_regs(mat, n, f16):
    """Inverse of :func:`regs_to_mat`: rows of the result are registers."""
    if f16:
        x = mat.astype(F2).reshape(2, 8, n // 8, 8).transpose(2, 0, 1, 3)
        return np.ascontiguousarray(x).reshape(n // 4, 64).view(U4)
    x = mat.reshape(2, 8, n // 8, 4, 2).transpose(2, 0, 4, 1, 3)
    return np.ascontiguousarray(x).reshape(n // 2, 32)


@op("wgmma")
def _wgmma(g, i):
    g.kc.env.update(MMA_ENV)
    ms = i.modset
    if "fence" in ms:
        return
    if "commit_group" in ms:
        g.emit("W.wg_commit()")
        return
    if "wait_group" in ms:
        n = g.imm_of(i.ops[0])
        g.flush_regs(list(g.kc.wgregs))
        s = g.bind("S", g.kc.where_text(i))
        g.emit(f"if m is not None: W.need_full(m, {s})")
        g.emit(f"W.wg_wait({n})")
        g.drop(g.kc.wgregs)
        return
    if "sp" in ms:
        g.unsupported(i)
    require_full_warp(g, i)
    shape = next(m for m in i.mods if re.fullmatch(r"m64n\d+k\d+", m))
    n, k = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", shape).groups())
    ty = [
        m for m in i.mods if m in ("f16", "bf16", "f32", "tf32", "s8", "u8", "s32", "e4m3", "e5m2")
    ]
    dt, at, bt = ty[:3]
    D, A, B = i.ops[:3]
    rest = i.ops[3:]
    dregs = [x.name for x in D.items]
    site = Site(g.kc, i, "shared", 1, 1, 0)
    scale_d = rest[0] if rest else Imm(1)
    imms = [g.imm_of(x) for x in rest[1:]]
    sa, sb = (imms[0], imms[1]) if len(imms) >= 2 else (1, 1)
    sa = -1 if sa in (-1, 0xFFFFFFFF) else sa
    sb = -1 if sb in (-1, 0xFFFFFFFF) else sb
    tr = imms[2:]
    if isinstance(A, Vec):
        aexpr = "(" + ", ".join(g.src(x, "u4") for x in A.items) + ",)"
        ta, tb = 0, (tr[0] if tr else 0)
    else:
        aexpr = f"int({g.src(A, 'u8')}[0])"
        ta, tb = ([*tr, 0, 0])[:2]
    bexpr = f"int({g.src(B, 'u8')}[0])"
    if isinstance(scale_d, Reg):
        sd = f"bool({g.src(scale_d, 'b')}[0])"
    else:
        sd = str(bool(g.imm_of(scale_d)))
    s = g.bind(
        "G",
        WgOp(
            site,
            n,
            k,
            dt,
            at,
            bt,
            ta,
            tb,
            sa,
            sb,
            tuple(g.kc.reg_index[r] for r in dregs),
            tuple(g.kc.kind[r] for r in dregs),
        ),
    )
    g.flush_regs(dregs)
    g.emit(f"W.wg_issue({s}, {aexpr}, {bexpr}, {sd})")
    g.drop(dregs)


class WgOp:
    """Static part of one wgmma.mma_async."""

    def __init__(self, site, n, k, dt, at, bt, ta, tb, sa, sb, dregs, dkinds):
        self.site, self.n, self.k, self.dt, self.at, self.bt = site, n, k, dt, at, bt
        self.ta, self.tb, self.sa, self.sb = ta, tb, sa, sb
        self.dregs, self.dkinds = dregs, dkinds
        self.f16 = dt == "f16"

    def run(self, W, acc, a, b, scale_d):
        """Perform the product for this warp's 16 rows."""
        k, n = self.k, self.n
        row0 = 16 * (W.index % 4)
        if isinstance(a, tuple):
            A = frag_a(self.at, *a)
            # frag_a keeps fragment column order; restore natural K order for B from memory
            e = 4 // EBYTES[self.at]
            A = A.reshape(16, len(a) // 2, 4 * e).reshape(16, k)
        else:
            A = read_operand(W, self.site, a, 16, k, self.at, self.ta, row0)
        B = W.cta.wg_operand(W, self.site, b, n, k, self.bt, self.tb)
        if self.dt == "s32":
            r = (A.astype(np.float64) @ B.T.astype(np.float64)).astype(np.int64).astype(S4)
        else:
            r = A @ B.T
            if self.sa * self.sb < 0:
                r = -r
        if scale_d:
            acc.mat = acc.mat + r
        else:
            acc.mat = r
        if self.f16:
            acc.mat = acc.mat.astype(F2).astype(F4)
