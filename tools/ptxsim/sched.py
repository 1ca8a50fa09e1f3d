"""CTAs, barriers and the scheduler."""

import time

import numpy as np

from . import races
from .errors import DeadlockError
from .helpers import LANES, U1, U4
from .mbarriers import land_ops
from .memory import Rows
from .ops_wgmma import read_operand
from .warp import Warp

_ALLMASK = np.ones(32, bool)


class SharedAddresses(dict):
    def __init__(self, base):
        self.base = base

    def __missing__(self, key):
        off, kind = key
        v = np.full(32, off + self.base, kind)
        self[key] = v
        return v


class CTA:
    """One thread block."""

    def __init__(self, launch, ctaid, rank=0, cluster=None):
        self.launch, self.ctaid, self.rank = launch, ctaid, rank
        self.cluster = cluster
        self.rank32 = np.full(32, rank << 24, U4)
        n = launch.smem_total
        self.smem_size = n
        pad = (n + 127) // 128 * 128 + 128
        self.smem = np.full(pad, 0xFF, U1)
        self.valid_bytes = np.zeros(pad, U1)
        self.pending_bytes = np.zeros(pad, U1)
        self.srows = Rows(self.smem, n)
        self.svalid = Rows(self.valid_bytes, n)
        self.spending = Rows(self.pending_bytes, n)
        self.granule = launch.kc.granule
        self.bars, self.mbars, self.sync_vc = {}, {}, {}
        self.sa = SharedAddresses(rank << 24)
        self.shadow = None
        bx, by, bz = launch.block
        t = bx * by * bz
        self.live = t
        self.warps = []
        for w in range((t + 31) // 32):
            on = (LANES + 32 * w) < t
            self.warps.append(Warp(self, w, on))

    def shaddr(self, off, kind):
        return self.sa[(off, kind)]

    def agent(self, vidx):
        """Name of a vector-clock component."""
        for c in self.cluster.values() if self.cluster else [self]:
            if vidx == c.agent_index:
                return "the asynchronous copy unit"
            for w in c.warps:
                if w.vidx == vidx:
                    return f"warp {w.index}" + (
                        f" of cluster CTA {c.rank}"
                        if self.cluster and len(self.cluster) > 1
                        else ""
                    )
        return "?"

    def wg_operand(self, W, site, desc, n, k, t, trans):
        return read_operand(W, site, desc, n, k, t, trans)

    def specials(self, w):
        L = self.launch
        bx, by, _bz = L.block
        t = LANES + U4(32 * w)
        d = dict(L.uniform_specials)
        d["tid.x"] = t % U4(bx)
        d["tid.y"] = t // U4(bx) % U4(by)
        d["tid.z"] = t // U4(bx * by)
        for c, v in zip("xyz", self.ctaid):
            d[f"ctaid.{c}"] = np.full(32, v, U4)
        d["warpid"] = np.full(32, w, U4)
        nx, ny, nz = L.cluster_dims
        cx, cy, cz = (self.ctaid[0] % nx, self.ctaid[1] % ny, self.ctaid[2] % nz)
        for c, v in zip("xyz", (cx, cy, cz)):
            d[f"cluster_ctaid.{c}"] = np.full(32, v, U4)
        for c, v, q in zip("xyz", self.ctaid, (nx, ny, nz)):
            d[f"clusterid.{c}"] = np.full(32, v // q, U4)
        d["cluster_ctarank"] = np.full(32, self.rank, U4)
        lin = self.ctaid[0] + L.grid[0] * (self.ctaid[1] + L.grid[1] * self.ctaid[2])
        d["smid"] = np.full(32, lin % 132, U4)
        return d

    def lanes_exited(self, n):
        self.live -= n
        if self.clbar is not None:
            self.clbar.live -= n
            if self.clbar.live > 0:
                self.clbar.check()
        for b in list(self.bars.values()):
            if b.waiters and not b.count:
                self.try_release(b)

    clbar = None

    def try_release(self, b):
        """Open a barrier once everyone expected has arrived."""
        if not b.arrivals:
            return False
        if b.count:
            if b.threads < b.count:
                return False
        elif b.lanes < self.live:
            return False
        vc, waiters, red = b.vc, b.waiters, b.red
        allred = np.concatenate(red) if red else None
        b.reset()
        self.launch.progress += 1
        for W, f, nxt, rd, m in waiters:
            if W.check:
                races.acquire(W, vc)
            if rd is not None:
                what, dest, _, dk = rd
                if what == "popc":
                    v = np.full(32, int(allred.sum()), U4)
                else:
                    v = np.full(32, bool(allred.all() if what == "and" else allred.any()))
                old = W.R[dest]
                if dk not in ("b", "u4"):
                    v = v.view(old.dtype)
                W.R[dest] = v if m is None else np.where(m, v, old)
            f.pc = nxt
            W.wake(f)
        return True


def run_ctas(launch, ctas, order="random"):
    """Run a set of co-resident CTAs to completion."""
    rng = launch.rng
    ready = launch.ready
    ready.clear()
    for c in ctas:
        for w in c.warps:
            w.queued = True
            ready.append(w)
    stalled, last = 0, -1
    step = 0
    rr = order == "round-robin"
    maxb = launch.quantum
    turns = 0
    while True:
        turns += 1
        if launch.deadline and not turns & 255 and time.monotonic() > launch.deadline:
            raise DeadlockError("time limit reached\n" + stands(ctas))
        if not ready:
            if not land_something(launch, ctas):
                break
            continue
        if rr:
            w = ready.pop(0)
        else:
            k = rng.randrange(len(ready))
            w = ready[k]
            ready[k] = ready[-1]
            ready.pop()
        w.queued = False
        more = w.run(rng.randint(1, maxb))
        if more and w.frags and not w.queued:
            w.queued = True
            ready.append(w)
        if w.yield_:
            step += 1
            if launch.progress == last:
                stalled += 1
                if stalled > launch.spin_limit:
                    if not land_something(launch, ctas):
                        raise DeadlockError(
                            "no progress: every warp spins or waits\n" + stands(ctas)
                        )
                    stalled = 0
                elif stalled % 64 == 63:
                    land_something(launch, ctas)
            else:
                last, stalled = launch.progress, 0
        else:
            stalled = 0
    left = [w for c in ctas for w in c.warps if w.frags]
    if left:
        raise DeadlockError("deadlock: no warp can run\n" + stands(ctas))


def land_something(launch, ctas):
    """Complete the copies of one mbarrier that has waiters; True if anything landed."""
    cands = [mb for c in ctas for mb in list(c.mbars.values()) if mb.waiters and mb.ops]
    if not cands:
        return False
    mb = cands[launch.rng.randrange(len(cands))]
    land_ops(mb)
    return True


def stands(ctas):
    o = []
    for c in ctas:
        for w in c.warps:
            if w.frags:
                o.append(w.stand())
    if len(o) > 24:
        o = [*o[:24], f"    ... and {len(o) - 24} more warps"]
    return "\n".join(o)
