"""mbarriers: arrival counts, transaction bytes, and who waits for them."""

import numpy as np

from . import races
from .errors import PtxError
from .helpers import U8, lanes_of
from .memory import SHARED_ORIGIN


# ---------------------------------------------------------------- mbarriers
class MBar:
    """State of one mbarrier object."""

    def __init__(self, cta, off, count):
        self.cta, self.off = cta, off
        self.expected = self.pending = count
        self.tx = 0
        self.phase = 0
        self.waiters = []
        self.ops = []
        self.vc = None

    def check_done(self):
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.expected
            self.cta.launch.progress += 1
            for W, f in self.waiters:
                W.wake(f)
            self.waiters = []

    def arrive(self, n, where, W=None):
        if n > self.pending:
            raise PtxError(
                f"mbarrier at offset {self.off} receives {n} arrivals with only "
                f"{self.pending} pending at {where}",
                "mbarrier",
            )
        self.pending -= n
        self.cta.launch.progress += 1

    def join(self, v):
        if v is not None:
            self.vc = v if self.vc is None else np.maximum(self.vc, v)


def find_mbar(W, addr, where, create=None):
    """The mbarrier at a 32-bit shared address (of any CTA in the cluster)."""
    rank, off = addr >> 24, (addr & 0xFFFFFF) - SHARED_ORIGIN
    cta = W.cta
    if rank != cta.rank:
        cta = cta.cluster.get(rank) if cta.cluster else None
    if cta is None or off < 0 or off + 8 > cta.smem_size or off % 8:
        raise PtxError(
            f"bad mbarrier address {addr:#x} in {W.describe()} at {where}", "out-of-bounds"
        )
    if create is not None:
        mb = cta.mbars[off] = MBar(cta, off, create)
        cta.smem[off : off + 8] = 0
        cta.valid_bytes[off : off + 8] = 1
        return mb
    mb = cta.mbars.get(off)
    if mb is None:
        raise PtxError(
            f"use of an mbarrier that was not initialised (offset {off}) by "
            f"{W.describe()} at {where}",
            "mbarrier",
        )
    return mb


def mb_init(W, addr, m, count, where):
    for l in lanes_of(m):
        a = int(addr[l])
        c = int(count[l])
        if not 1 <= c < (1 << 20):
            raise PtxError(f"mbarrier.init count {c} out of range at {where}", "mbarrier")
        find_mbar(W, a, where, c)


def mb_inval(W, addr, m, where):
    for l in lanes_of(m):
        mb = find_mbar(W, int(addr[l]), where)
        mb.cta.mbars.pop(mb.off, None)


def mb_arrive(W, addr, m, count, tx, drop, where):
    """arrive (count), or arrive.expect_tx (tx); returns state tokens."""
    out = np.zeros(32, U8)
    v = races.release(W) if W.check else None
    for l in lanes_of(m):
        mb = find_mbar(W, int(addr[l]), where)
        out[l] = mb.phase
        mb.join(v)
        if tx is not None:
            mb.tx += int(tx[l])
        if drop:
            mb.expected -= 1
        mb.arrive(1 if count is None else int(count[l]), where)
        mb.check_done()
    return out


def mb_tx(W, addr, m, tx, sign, where):
    for l in lanes_of(m):
        mb = find_mbar(W, int(addr[l]), where)
        mb.tx += sign * int(tx[l])
        if sign < 0:
            mb.check_done()


def mb_wait(W, addr, m, arg, parity, blocking, where):
    """Predicate of try_wait/test_wait, or None after suspending the lanes."""
    out = np.zeros(32, bool)
    first_false = None
    for l in lanes_of(m):
        mb = find_mbar(W, int(addr[l]), where)
        if parity:
            done = (mb.phase & 1) != (int(arg[l]) & 1)
        else:
            done = mb.phase != int(arg[l])
        out[l] = done
        if not done:
            first_false = mb
        elif m is None and l == 0 and (addr == addr[0]).all() and (arg == arg[0]).all():
            out[:] = True
            break
        if not done and m is None and l == 0 and (addr == addr[0]).all():
            break
    if first_false is None:
        if W.check:
            a = -1
            for l in lanes_of(m):
                if int(addr[l]) != a:
                    a = int(addr[l])
                    races.acquire(W, find_mbar(W, a, where).vc)
        return out
    mb = first_false
    if not blocking:
        if mb.ops:
            land_ops(mb)
        W.yield_ = True
        return out
    f = W.cur
    f.wait = ("mbarrier", mb, where)
    mb.waiters.append((W, f))
    return None


def land_ops(mb):
    """Land every copy pending on an mbarrier."""
    ops, mb.ops = mb.ops, []
    for o in ops:
        o.land()
