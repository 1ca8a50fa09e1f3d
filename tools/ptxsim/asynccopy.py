"""Asynchronous machinery: cp.async groups, mbarriers, bulk and tensor copies.

Data lands as late as the programming model allows: at the wait that makes it visible, or,
for copies signalled through an mbarrier, when nothing but the waiters of that mbarrier can
run.  Until then the destination is poisoned and marked as pending.
"""

import numpy as np

from . import races, tma
from .access import READ, WRITE
from .errors import PtxError
from .helpers import U1, U4, U8, lanes_of
from .mbarriers import find_mbar
from .memory import PARAM_WIN, SHARED_ORIGIN


# ---------------------------------------------------------------- cp.async (non-bulk)
class CpAsync:
    """One cp.async instruction waiting to land."""

    __slots__ = ("dst", "m", "nsrc", "site", "src")

    def __init__(self, site, dst, src, nsrc, m):
        self.site, self.dst, self.src, self.nsrc, self.m = site, dst, src, nsrc, m


def make_cp_async(gsite, ssite, size):
    """Closure issuing a cp.async of ``size`` bytes per lane."""
    w, n = (4, 1) if size == 4 else (8, size // 8)
    key = (w, n)
    index = ssite.shared_index()
    goff = np.full(32, gsite.off & (2**64 - 1), U8)
    ones = {4: U4(0x01010101), 8: U8(0x0101010101010101)}[w]

    def issue(W, dst, src, m, nsrc):
        cta = W.cta
        ix = index(cta, dst)
        if m is not None:
            ix = ix[m]
            if ix.size == 0:
                return
        src = src + goff
        # fault checks now, data movement later
        act = m
        if nsrc is not None:
            need = nsrc > 0
            act = need if m is None else need & m
        if act is None or act.any():
            check_global(gsite, W, src, act)
            if gsite.metrics:
                gsite.note(src, act)
        try:
            cta.srows[key][ix] = U8(2**64 - 1) if w == 8 else U4(2**32 - 1)
        except IndexError:
            ssite.shared_fault(W, dst, m)
            raise PtxError(f"cp.async to another CTA at {ssite.where}") from None
        if W.check:
            cta.svalid[key][ix] = 0
            cta.spending[key][ix] = ones
            W.log.append((ssite, ix, WRITE))
        if ssite.metrics:
            ssite.note(dst, m)
        W.cp_open.append(CpAsync((gsite, ssite, key, ones), ix, src, nsrc, m))

    return issue


def check_global(site, W, addr, m):
    """Bounds and alignment check of lane addresses (all of them in the common allocation)."""
    al = site.alloc
    if al is not None:
        o = addr - al.base32
        if m is not None:
            o = o[m]
        if int(o.max()) + site.t <= al.size and not int(np.bitwise_or.reduce(o)) & (site.t - 1):
            return
    off, site.off = site.off, 0
    site.resolve(W, addr, m)
    site.off = off


def land_cp(W, op):
    """Copy the data of one cp.async."""
    gsite, ssite, key, ones = op.site
    cta = W.cta
    src = op.src if op.m is None else op.src[op.m]
    nsrc = op.nsrc if op.nsrc is None or op.m is None else op.nsrc[op.m]
    al = gsite.alloc
    w, n = key
    mem = W.cta.launch.mem
    out = np.zeros((len(src), n) if n > 1 else len(src), U4 if w == 4 else U8)
    t = w * n
    full = nsrc is None or bool((nsrc >= t).all())
    a0 = src - np.uint64(al.base) if al is not None else None
    if full and al is not None and int(a0.max()) + t <= al.size:
        out = al.rows[key].take((a0 // np.uint64(t)).astype(np.int64), 0)
    else:
        for k in range(len(src)):
            c = t if nsrc is None else min(t, int(nsrc[k]))
            if c:
                raw = np.zeros(t, U1)
                raw[:c] = mem.read(int(src[k]), c)
                out[k] = raw.view(out.dtype) if n > 1 else raw.view(out.dtype)[0]
    cta.srows[key][op.dst] = out
    if W.check:
        cta.svalid[key][op.dst] = ones
        cta.spending[key][op.dst] = 0
        W.log.append((ssite, op.dst, WRITE))


def cp_commit(W):
    W.cp_groups.append(W.cp_open)
    W.cp_open = []


def cp_wait(W, n):
    """wait_group n (None: wait_all)."""
    if n is None:
        W.cp_groups.append(W.cp_open)
        W.cp_open = []
        n = 0
    while len(W.cp_groups) > n:
        for op in W.cp_groups.pop(0):
            land_cp(W, op)


# ---------------------------------------------------------------- bulk and tensor copies
class BulkOp:
    """A bulk or tensor copy in flight."""

    def __init__(self, W, site):
        self.W, self.site, self.cta = W, site, W.cta
        if W.check:
            self.vc = races.release(W)
        else:
            self.vc = None
        self.mbars = []
        self.done = False

    def agent(self, cta, kind, addr, nbytes):
        """Race-check an access by the async agent of ``cta``; ``addr`` are 16-byte rows."""
        if self.vc is None or cta.shadow is None:
            return
        cl = self.W.clocks
        a = cta.agent_index
        v = self.vc.copy()
        v[a] = max(v[a], 0)
        clock = int(cl.vc[a, a])
        g = cta.shadow.g
        gr = (addr[:, None] * (16 // g) + np.arange(16 // g)).ravel()
        if kind == READ:
            cta.shadow.proxy_check(self.W, v, gr, self.site)
        cta.shadow.access(a, v, clock, kind, gr, np.full(len(gr), self.site.id), None)
        cl.vc[a, a] = clock + 1
        v[a] = clock
        self.out_vc = v

    def finish(self):
        self.done = True


def smem_rows(cta, site, W, off, nbytes, swizzle=0):
    """16-byte row indices of a shared tile, after swizzling."""
    a = off + SHARED_ORIGIN + np.arange(0, nbytes, 16)
    if swizzle:
        bits = {32: 1, 64: 3, 128: 7}[swizzle]
        a = a ^ (((a >> 7) & bits) << 4)
    a = a - SHARED_ORIGIN
    if off < 0 or int(a.max()) + 16 > cta.smem_size or int(a.min()) < 0:
        site.fault(
            W,
            0,
            f"bulk copy outside shared memory: {nbytes} bytes at offset {off} of {cta.smem_size}",
            "out-of-bounds",
        )
    return a >> 4


def poison(cta, rows, check):
    cta.srows[(8, 2)][rows] = U8(2**64 - 1)
    if check:
        cta.svalid[(8, 2)][rows] = 0
        cta.spending[(8, 2)][rows] = U8(0x0101010101010101)


def split_addr(W, a, site):
    rank, off = a >> 24, (a & 0xFFFFFF) - SHARED_ORIGIN
    cta = W.cta if rank == W.cta.rank else (W.cta.cluster or {}).get(rank)
    if cta is None:
        site.fault(W, 0, f"bad shared::cluster address {a:#x}", "out-of-bounds")
    return cta, off


class ToShared(BulkOp):
    """global (or shared) -> shared, completing on an mbarrier."""

    def __init__(self, W, site, fetch, dsts, nbytes, swizzle):
        super().__init__(W, site)
        self.fetch, self.nbytes = fetch, nbytes
        self.targets = []
        for cta, off, mb in dsts:
            rows = smem_rows(cta, site, W, off, nbytes, swizzle)
            self.targets.append((cta, rows, mb))
            poison(cta, rows, W.check)
            mb.ops.append(self)
        W.cta.launch.async_ops += 1

    def land(self):
        if self.done:
            return
        self.done = True
        data = self.fetch().reshape(-1, 16).view(U8)
        for cta, rows, mb in self.targets:
            cta.srows[(8, 2)][rows] = data
            if self.W.check:
                cta.svalid[(8, 2)][rows] = U8(0x0101010101010101)
                cta.spending[(8, 2)][rows] = 0
                self.agent(cta, WRITE, rows, self.nbytes)
                mb.join(self.out_vc)
            if self in mb.ops:
                mb.ops.remove(self)
            mb.tx -= self.nbytes
            mb.check_done()


class FromShared(BulkOp):
    """shared -> global, completing through a bulk group."""

    def __init__(self, W, site, off, nbytes, swizzle, put):
        super().__init__(W, site)
        self.put, self.nbytes = put, nbytes
        self.rows = smem_rows(W.cta, site, W, off, nbytes, swizzle)

    def land(self):
        if self.done:
            return
        self.done = True
        cta, W = self.cta, self.W
        if W.check:
            v = cta.svalid[(8, 2)].take(self.rows, 0)
            if b"\0" in v.tobytes() and W.cta.launch.check_uninit:
                self.site.fault(
                    W, 0, "bulk store reads uninitialised shared memory", "uninitialised"
                )
            self.agent(cta, READ, self.rows, self.nbytes)
            if self.vc is not None:
                cl = W.clocks.vc
                cl[W.vidx] = np.maximum(cl[W.vidx], self.out_vc)
        self.put(np.ascontiguousarray(cta.srows[(8, 2)].take(self.rows, 0)).view(U1).reshape(-1))


def bulk_commit(W):
    W.bulk_groups.append(W.bulk_open)
    W.bulk_open = []


def bulk_wait(W, n):
    if W.check:
        races.flush(W)
    while len(W.bulk_groups) > n:
        for o in W.bulk_groups.pop(0):
            o.land()


def read_tensormap(W, addr, where):
    """Decode the tensor map at a generic address."""
    L = W.cta.launch
    if PARAM_WIN <= addr < PARAM_WIN + (1 << 40):
        o = addr - PARAM_WIN
        raw = L.params[o : o + 128].tobytes()
    elif addr >> 48 == 1:
        o = (addr & 0xFFFFFF) - SHARED_ORIGIN
        raw = W.cta.smem[o : o + 128].tobytes()
    else:
        raw = L.mem.read(addr, 128).tobytes()
    if addr % 64:
        raise PtxError(f"tensor map at {addr:#x} is not 64-byte aligned at {where}", "misaligned")
    d = L.tm_cache.get(raw)
    if d is None:
        d = L.tm_cache[raw] = tma.Decoded(raw, where)
    return d


def tensor_load(W, site, m, dst, tmap, coords, mbar, mcast):
    for l in lanes_of(m):
        d = read_tensormap(W, int(tmap[l]), site.where)
        c = [int(x[l]) for x in coords]
        if len(c) != d.n:
            raise PtxError(f"tensor map has rank {d.n}, instruction uses {len(c)} at {site.where}")
        a = int(dst[l])
        if a % 128:
            site.fault(W, l, f"TMA destination {a:#x} is not 128-byte aligned", "misaligned")
        dsts = bulk_targets(W, site, a, int(mbar[l]), None if mcast is None else int(mcast[l]))
        mem = W.cta.launch.mem
        W.cta.launch.metrics.tma_bytes[0] += d.bytes
        ToShared(
            W, site, lambda d=d, c=c: tma.read_tile(mem, d, c, site.where), dsts, d.bytes, d.swizzle
        )


def bulk_targets(W, site, a, mb_addr, mask):
    cta, off = split_addr(W, a, site)
    if mask is None:
        return [(cta, off, find_mbar(W, mb_addr, site.where))]
    out = []
    for r in range(16):
        if mask >> r & 1:
            c = W.cta.cluster.get(r) if W.cta.cluster else (W.cta if r == 0 else None)
            if c is None:
                site.fault(W, 0, f"multicast to CTA {r} outside the cluster", "out-of-bounds")
            out.append((c, off, find_mbar(W, (r << 24) | (mb_addr & 0xFFFFFF), site.where)))
    return out


def tensor_store(W, site, m, src, tmap, coords, red):
    for l in lanes_of(m):
        d = read_tensormap(W, int(tmap[l]), site.where)
        c = [int(x[l]) for x in coords]
        if len(c) != d.n:
            raise PtxError(f"tensor map has rank {d.n}, instruction uses {len(c)} at {site.where}")
        _cta, off = split_addr(W, int(src[l]), site)
        if int(src[l]) % 128:
            site.fault(W, l, f"TMA source {int(src[l]):#x} is not 128-byte aligned", "misaligned")
        mem = W.cta.launch.mem
        W.cta.launch.metrics.tma_bytes[1] += d.bytes
        W.bulk_open.append(
            FromShared(
                W,
                site,
                off,
                d.bytes,
                d.swizzle,
                lambda x, d=d, c=c: tma.write_tile(mem, d, c, x, site.where, red),
            )
        )


def bulk_load(W, site, m, dst, src, size, mbar, mcast, from_shared):
    for l in lanes_of(m):
        n = int(size[l])
        a, s = int(dst[l]), int(src[l])
        if n % 16 or a % 16 or s % 16:
            site.fault(
                W,
                l,
                f"bulk copy of {n} bytes from {s:#x} to {a:#x} is not 16-byte aligned",
                "misaligned",
            )
        if n == 0:
            continue
        dsts = bulk_targets(W, site, a, int(mbar[l]), None if mcast is None else int(mcast[l]))
        mem = W.cta.launch.mem
        if from_shared:
            sc, so = split_addr(W, s, site)

            def fetch(sc=sc, so=so, n=n):
                return sc.smem[so : so + n].copy()
        else:
            al = mem.find(s)
            if al is None or s + n > al.base + al.size:
                site.fault(
                    W,
                    l,
                    f"out-of-bounds bulk read of {n} bytes at {s:#x}: {mem.describe(s)}",
                    "out-of-bounds",
                )
            al.touched(False)[(1, 1)][s - al.base : s - al.base + n] = 1
            W.cta.launch.metrics.tma_bytes[0] += n

            def fetch(s=s, n=n):
                return mem.read(s, n).copy()

        ToShared(W, site, fetch, dsts, n, 0)


def bulk_store(W, site, m, dst, src, size, red, ty):
    for l in lanes_of(m):
        n = int(size[l])
        a, s = int(dst[l]), int(src[l])
        if n % 16 or a % 16 or s % 16:
            site.fault(
                W,
                l,
                f"bulk store of {n} bytes from {s:#x} to {a:#x} is not 16-byte aligned",
                "misaligned",
            )
        if n == 0:
            continue
        mem = W.cta.launch.mem
        al = mem.find(a)
        if al is None or a + n > al.base + al.size:
            site.fault(
                W,
                l,
                f"out-of-bounds bulk write of {n} bytes at {a:#x}: {mem.describe(a)}",
                "out-of-bounds",
            )
        _cta, off = split_addr(W, s, site)
        al.touched(True)[(1, 1)][a - al.base : a - al.base + n] = 1
        W.cta.launch.metrics.tma_bytes[1] += n

        def put(x, a=a, n=n):
            v = mem.read(a, n)
            if red is None:
                v[:] = x
            else:
                w = {"f16": 2, "bf16": 2}.get(ty, 8 if ty.endswith("64") else 4)
                k = {2: np.uint16, 4: np.uint32, 8: np.uint64}[w]
                v[:] = tma.reduce_values(v.view(k), x.view(k), red, ty).view(U1)

        W.bulk_open.append(FromShared(W, site, off, n, 0, put))


class StoreAsync:
    """One lane's st.async in flight."""

    def __init__(self, W, cta, off, data, mb):
        self.W, self.cta, self.off, self.data, self.mb = W, cta, off, data, mb
        self.vc = races.release(W) if W.check else None
        mb.ops.append(self)

    def land(self):
        n = len(self.data)
        self.cta.smem[self.off : self.off + n] = self.data
        self.cta.valid_bytes[self.off : self.off + n] = 1
        self.mb.join(self.vc)
        self.mb.tx -= n
        self.mb.check_done()


def store_async(W, site, m, addr, vals, mbar):
    for l in lanes_of(m):
        a = int(addr[l])
        cta, off = split_addr(W, a, site)
        if off < 0 or off + site.t > cta.smem_size or off % site.t:
            site.fault(W, l, f"bad st.async address {a:#x}", "out-of-bounds")
        data = np.array([v[l] for v in vals]).view(U1)
        StoreAsync(W, cta, off, data, find_mbar(W, int(mbar[l]), site.where))


class NoincArrive:
    """cp.async.mbarrier.arrive: lands the warp's earlier cp.async, then arrives."""

    def __init__(self, W, mb, ops, n, noinc, where):
        self.W, self.mb, self.ops, self.n, self.where = W, mb, ops, n, where
        if not noinc:
            mb.pending += n
        mb.ops.append(self)

    def land(self):
        for o in self.ops:
            if o is not None:
                land_cp(self.W, o)
        if self.W.check:
            self.mb.join(races.release(self.W))
        self.mb.arrive(self.n, self.where)
        self.mb.check_done()


def cp_mbar_arrive(W, addr, m, noinc, where):
    ops = [o for grp in W.cp_groups for o in grp] + W.cp_open
    W.cp_groups, W.cp_open = [], []
    by = {}
    for l in lanes_of(m):
        by[int(addr[l])] = by.get(int(addr[l]), 0) + 1
    for k, (a, n) in enumerate(by.items()):
        NoincArrive(W, find_mbar(W, a, where), ops if k == 0 else [], n, noinc, where)
