"""Shared-memory race detection with vector clocks.

Every warp has a clock; synchronisation (barriers, mbarriers, strong or atomic accesses,
cluster barriers) joins clocks.  Accesses are logged and checked in bulk when the warp next
synchronises, against per-granule shadow memory holding the last write and each agent's last
read.  Each CTA also has one asynchronous agent (TMA, bulk copies).  The granule is the
smallest shared access width of the kernel, at most 4 bytes, so the check is exact.
"""

import numpy as np

from .access import ATOMIC, READ, WRITE
from .errors import RaceError


class Clocks:
    """Vector clocks of the warps of one CTA or cluster, plus one async agent per CTA."""

    def __init__(self, nwarps, nctas):
        self.n, self.nwarps = nwarps + nctas, nwarps
        self.fences = []  # (warp, clock vector) of recent fence.proxy.async
        self.vc = np.zeros((self.n, self.n), np.int64)
        for k in range(self.n):
            self.vc[k, k] = 1


class Shadow:
    """Shadow of one CTA's shared memory."""

    def __init__(self, cta, size, granule, ncomp):
        self.cta, self.g = cta, granule
        self.plain = np.array([s.ins.op != "cp" for s in cta.launch.kc.sites] or [True])
        ng = size // granule + 1
        self.wclock = np.zeros(ng, np.int64)
        self.wwho = np.zeros(ng, np.int32)
        self.wsite = np.zeros(ng, np.int32)
        self.rclock = np.zeros((ncomp, ng), np.int64)
        self.rsite = np.zeros((ncomp, ng), np.int32)

    def access(self, who, vc, clock, kind, ix, sid, desc):
        """Check and record accesses to granules ``ix`` by agent ``who``."""
        if not self.cta.launch.check_race:
            return
        wc = self.wclock[ix]
        bad = wc > vc[self.wwho[ix]]
        if bad.any():
            k = int(bad.argmax())
            self.report(
                ix[k], who, sid[k], kind, int(self.wwho[ix[k]]), int(self.wsite[ix[k]]), WRITE, desc
            )
        if kind == WRITE:
            rb = self.rclock[:, ix] > vc[:, None]
            if rb.any():
                o, k = (int(x) for x in np.argwhere(rb)[0])
                self.report(ix[k], who, sid[k], kind, o, int(self.rsite[o, ix[k]]), READ, desc)
            self.wclock[ix] = clock
            self.wwho[ix] = who
            self.wsite[ix] = sid
        else:
            self.rclock[who, ix] = clock
            self.rsite[who, ix] = sid

    def proxy_check(self, W, vc, ix, site):
        """Warn if the async proxy reads plain stores that no proxy fence covers.

        Data written by ``cp.async`` is exempt: compilers rely on its wait alone.
        """
        who, c = self.wwho[ix], self.wclock[ix]
        gen = (c > 0) & (who < W.clocks.nwarps) & self.plain[self.wsite[ix]]
        if not gen.any():
            return
        for x in np.unique(who[gen]).tolist():
            need = int(c[gen & (who == x)].max())
            if not any(f[x] >= need and f[y] <= vc[y] for y, f in reversed(W.clocks.fences)):
                k = int((gen & (who == x) & (c == need)).argmax())
                w = self.cta.launch.kc.sites[int(self.wsite[ix[k]])].where
                self.cta.launch.warn(
                    f"no fence.proxy.async between the write at {w[:110]} and "
                    f"its use by the async proxy at {site.where[:110]}"
                )
                return

    def report(self, granule, who, sid, kind, other, osid, okind, desc):
        sites = self.cta.launch.kc.sites
        names = {READ: "read", WRITE: "write", ATOMIC: "atomic"}
        raise RaceError(
            f"shared-memory race at offset {int(granule) * self.g} in block {self.cta.ctaid} of "
            f"kernel {self.cta.launch.kc.name}:\n"
            f"  {names[kind]} by {self.cta.agent(who)} at {sites[int(sid)].where}\n"
            f"  is not ordered after the {names[okind]} by {self.cta.agent(other)} at "
            f"{sites[osid].where}"
        )


def flush(W):
    """Check the accesses logged by a warp since its last synchronisation."""
    log = W.log
    if not log:
        return
    W.log = []
    if not W.cta.launch.check_race:
        return
    sh = W.cta.shadow
    g = sh.g
    groups = {}
    for e in log:
        t = e[0].t if len(e) == 3 else e[3]
        groups.setdefault((e[2], t), []).append(e)
    vc = W.clocks.vc[W.vidx]
    clock = int(vc[W.vidx])
    # reads first: a read after an own write never conflicts with itself
    for (kind, t), es in sorted(groups.items(), key=lambda kv: kv[0][0]):
        ix = np.concatenate([e[1] for e in es]).astype(np.int64)
        sid = np.repeat([e[0].id for e in es], [len(e[1]) for e in es])
        f = t // g
        if f > 1:
            ix = (ix[:, None] * f + np.arange(f)).ravel()
            sid = np.repeat(sid, f)
        sh.access(W.vidx, vc, clock, kind, ix, sid, None)


def release(W):
    """Flush, return the warp's clock for a join, and start a new epoch."""
    flush(W)
    v = W.clocks.vc[W.vidx].copy()
    W.clocks.vc[W.vidx, W.vidx] += 1
    return v


def acquire(W, v):
    """Join a clock into the warp's."""
    flush(W)
    if v is not None:
        np.maximum(W.clocks.vc[W.vidx], v, out=W.clocks.vc[W.vidx])


def proxy_fence(W):
    """Record a fence.proxy.async: it covers what the warp has seen so far."""
    flush(W)
    c = W.clocks
    c.fences.append((W.vidx, c.vc[W.vidx].copy()))
    if len(c.fences) > 256:
        del c.fences[:128]
    c.vc[W.vidx, W.vidx] += 1
