"""Run-time memory accesses: one :class:`Site` per memory instruction.

A site builds a closure specialised for its width, vector length and constant offset.  The
element index is the byte offset rotated right by log2(width), so that a misaligned offset
turns into a huge index and the ordinary index check catches misalignment and overrun alike.
"""

import numpy as np

from .errors import MemoryFault, PtxError
from .helpers import LANES, S8, U1, U2, U4, U8
from .memory import PARAM_WIN, SHARED_ORIGIN

READ, WRITE, ATOMIC = 0, 1, 2
M64 = (1 << 64) - 1


class Site:
    """Static description and per-launch caches of one memory instruction."""

    def __init__(self, kc, ins, space, w, n, off, write=False):
        self.kc, self.ins = kc, ins
        self.space, self.w, self.n, self.off, self.write = space, w, n, off, write
        self.t = w * n
        self.s = self.t.bit_length() - 1
        self.id = len(kc.sites)
        kc.sites.append(self)
        self.where = kc.where_text(ins)
        self.strong = bool(ins.modset & {"volatile", "acquire", "release", "relaxed", "mmio"})
        self.reset(None)

    def reset(self, launch):
        """Forget caches of a previous launch."""
        self.launch = launch
        self.alloc = self.view = self.base32 = None
        self.rec, self.nact, self.nreq = [], 0, 0
        self.metrics = launch is not None and launch.metrics_on

    # ------------------------------------------------------------ faults
    def fault(self, W, lane, what, kind, cls=MemoryFault):
        x = W.describe_lane(lane)
        raise cls(f"{what}\n  in {x}\n  at {self.where}", kind)

    def set_alloc(self, a):
        self.alloc = a
        self.view = a.rows[(self.w, self.n)]
        self.base32 = np.full(32, (a.base - self.off) & M64, U8)

    def note(self, addr, m):
        """Record addresses for the metrics (padded to 32 lanes)."""
        self.nreq += 1
        if m is None:
            self.nact += 32
            self.rec.append(addr)
        else:
            k = int(np.count_nonzero(m))
            if k == 0:
                return
            self.nact += k
            self.rec.append(np.where(m, addr, addr[int(m.argmax())]))
        if len(self.rec) >= 512:
            self.launch.metrics.flush(self)

    # ------------------------------------------------------------ slow resolution
    def resolve(self, W, addr, m):
        """Group lanes by region -> [(alloc, lanes, element indices)]; raises on faults.

        ``addr`` already includes the offset; it must be a global address.
        """
        mem = self.launch.mem
        groups = {}
        for lane in range(32) if m is None else np.flatnonzero(m).tolist():
            a = int(addr[lane])
            al = mem.find(a)
            verb = "write" if self.write else "read"
            if al is None or a + self.t > al.base + al.size:
                self.fault(
                    W,
                    lane,
                    f"out-of-bounds {self.space} {verb} of {self.t} bytes at "
                    f"{a:#x}: {mem.describe(a)}",
                    "out-of-bounds",
                )
            o = a - al.base
            if a % self.t:
                self.fault(
                    W,
                    lane,
                    f"misaligned {self.space} {verb} of {self.t} bytes at {a:#x}",
                    "misaligned",
                )
            g = groups.setdefault(id(al), (al, [], []))
            g[1].append(lane)
            g[2].append(o // self.t)
        if not groups:
            return []
        out = [(al, np.array(l), np.array(x)) for al, l, x in groups.values()]
        self.set_alloc(out[-1][0])
        return out

    # ------------------------------------------------------------ global
    def global_index(self):
        """Closure mapping lane addresses to element indices in ``self.view``."""
        s = self.s
        SH, RL = np.full(32, s, U8), np.full(32, 64 - s, U8)
        if s:

            def index(addr):
                o = addr - self.base32
                return ((o >> SH) | (o << RL)).view(S8)
        else:

            def index(addr):
                o = (addr - self.base32).view(S8)
                return np.where(o < 0, np.int64(1 << 62), o)

        return index

    def global_ld(self):
        w, n = self.w, self.n
        index = self.global_index()
        dt = {1: U1, 2: U2, 4: U4, 8: U8}[w]
        offv = np.full(32, self.off & M64, U8)
        has_off = bool(self.off)

        def slow(W, addr, m):
            out = np.zeros((32, n) if n > 1 else 32, dt)
            for al, lanes, idx in self.resolve(W, addr + offv, m):
                out[lanes] = al.rows[(w, n)][idx]
            return out

        def ld(W, addr, m):
            if self.view is None:
                v = slow(W, addr, m)
            else:
                ix = index(addr)
                try:
                    if m is None:
                        v = self.view.take(ix, 0)
                    else:
                        v = np.zeros((32, n) if n > 1 else 32, dt)
                        v[m] = self.view.take(ix[m], 0)
                except IndexError:
                    v = slow(W, addr, m)
            if self.metrics:
                self.note(addr + offv if has_off else addr, m)
            return v if n == 1 else v.T.copy()

        return ld

    def global_st(self):
        w, n = self.w, self.n
        index = self.global_index()
        dt = {1: U1, 2: U2, 4: U4, 8: U8}[w]
        offv = np.full(32, self.off & M64, U8)
        has_off = bool(self.off)

        def slow(W, addr, m, val):
            for al, lanes, idx in self.resolve(W, addr + offv, m):
                al.rows[(w, n)][idx] = val[lanes]

        def st(W, addr, m, *vals):
            if n == 1:
                val = vals[0]
            else:
                val = np.empty((32, n), dt)
                for k in range(n):
                    val[:, k] = vals[k]
            if self.view is None:
                slow(W, addr, m, val)
            else:
                ix = index(addr)
                try:
                    if m is None:
                        self.view[ix] = val
                    else:
                        self.view[ix[m]] = val[m]
                except IndexError:
                    slow(W, addr, m, val)
            if self.metrics:
                self.note(addr + offv if has_off else addr, m)

        return st

    # ------------------------------------------------------------ shared
    def shared_index(self):
        """Closure mapping 32-bit shared addresses to element indices (rank 0 origin)."""
        s = self.s
        KO = np.full(32, (self.off - SHARED_ORIGIN) & 0xFFFFFFFF, U4)
        SH, RL = np.full(32, s, U4), np.full(32, 32 - s, U4)
        if s:

            def index(cta, addr):
                o = addr + KO
                if cta.rank:
                    o = o - cta.rank32
                return (o >> SH) | (o << RL)
        else:

            def index(cta, addr):
                o = addr + KO
                if cta.rank:
                    o = o - cta.rank32
                return o

        return index

    def shared_fault(self, W, addr, m, cta=None):
        """Diagnose a failed shared access, or return lanes grouped by cluster CTA."""
        cta = cta or W.cta
        verb = "write" if self.write else "read"
        groups = {}
        for lane in range(32) if m is None else np.flatnonzero(m).tolist():
            a = (int(addr[lane]) + self.off) & 0xFFFFFFFF
            rank, o = a >> 24, (a & 0xFFFFFF) - SHARED_ORIGIN
            tgt = cta.cluster.get(rank) if cta.cluster else (cta if rank == cta.rank else None)
            if tgt is None or o < 0 or o + self.t > tgt.smem_size:
                self.fault(
                    W,
                    lane,
                    f"out-of-bounds shared {verb} of {self.t} bytes at shared "
                    f"address {a:#x} (offset {o}, shared memory has {cta.smem_size} bytes)",
                    "out-of-bounds",
                )
            if o % self.t:
                self.fault(
                    W,
                    lane,
                    f"misaligned shared {verb} of {self.t} bytes at offset {o}",
                    "misaligned",
                )
            g = groups.setdefault(rank, (tgt, [], []))
            g[1].append(lane)
            g[2].append(o // self.t)
        return [(c, np.array(l), np.array(x)) for c, l, x in groups.values()]

    def check_valid(self, W, cta, ix, addr, m):
        if (
            0 in cta.svalid[(self.w, self.n)].take(ix, 0).tobytes()
            if self.t == 1
            else 0 in cta.svalid[(self.w, self.n)].take(ix, 0).view(U1).tobytes()
        ):
            self.raise_uninit(W, cta, addr, m)

    def pending(self, cta, o):
        return bool(cta.pending_bytes[o : o + self.t].any())

    def raise_uninit(self, W, cta, addr, m):
        for lane in range(32) if m is None else np.flatnonzero(m).tolist():
            o = ((int(addr[lane]) + self.off) & 0xFFFFFF) - SHARED_ORIGIN
            v = cta.valid_bytes[o : o + self.t]
            pend = self.pending(cta, o)
            if not v.all() and (pend or self.launch.check_uninit):
                state = "a pending asynchronous copy" if pend else "never written"
                self.fault(
                    W,
                    lane,
                    f"read of uninitialised shared memory at offset {o} ({self.t} bytes): {state}",
                    "uninitialised",
                )

    def shared_ld(self):
        w, n = self.w, self.n
        index = self.shared_index()
        dt = {1: U1, 2: U2, 4: U4, 8: U8}[w]
        key = (w, n)

        def slow(W, addr, m):
            out = np.zeros((32, n) if n > 1 else 32, dt)
            for cta, lanes, idx in self.shared_fault(W, addr, m):
                if W.check:
                    mm = np.zeros(32, bool)
                    mm[lanes] = True
                    self.check_valid(W, cta, idx, addr, mm)
                out[lanes] = cta.srows[key][idx]
            return out

        def ld(W, addr, m):
            cta = W.cta
            ix = index(cta, addr)
            try:
                if m is None:
                    v = cta.srows[key].take(ix, 0)
                else:
                    ix = ix[m]
                    v = np.zeros((32, n) if n > 1 else 32, dt)
                    v[m] = cta.srows[key].take(ix, 0)
                if W.check:
                    if b"\0" in cta.svalid[key].take(ix, 0).tobytes():
                        self.raise_uninit(W, cta, addr, m)
                    if not self.strong:
                        W.log.append((self, ix, READ))
            except IndexError:
                v = slow(W, addr, m)
            if self.metrics:
                self.note(addr, m)
            return v if n == 1 else v.T.copy()

        return ld

    def shared_st(self):
        w, n = self.w, self.n
        index = self.shared_index()
        dt = {1: U1, 2: U2, 4: U4, 8: U8}[w]
        key = (w, n)
        ones = dt(int.from_bytes(b"\1" * w, "little"))

        def slow(W, addr, m, val):
            for cta, lanes, idx in self.shared_fault(W, addr, m):
                cta.srows[key][idx] = val[lanes]
                if W.check:
                    cta.svalid[key][idx] = ones

        def st(W, addr, m, *vals):
            if n == 1:
                val = vals[0]
            else:
                val = np.empty((32, n), dt)
                for k in range(n):
                    val[:, k] = vals[k]
            cta = W.cta
            ix = index(cta, addr)
            try:
                if m is None:
                    cta.srows[key][ix] = val
                else:
                    ix = ix[m]
                    cta.srows[key][ix] = val[m]
                if W.check:
                    cta.svalid[key][ix] = ones
                    if not self.strong:
                        W.log.append((self, ix, WRITE))
            except IndexError:
                slow(W, addr, m, val)
            if self.metrics:
                self.note(addr, m)

        return st

    # ------------------------------------------------------------ local and param
    def local_index(self, W, addr, m):
        o = (addr + U4(self.off & 0xFFFFFFFF)).astype(np.int64)
        t = self.t
        bad = (o + t > W.lmem.shape[1]) | (o % t != 0)
        if m is not None:
            bad = bad & m
        if bad.any():
            lane = int(bad.argmax())
            if o[lane] % t:
                self.fault(
                    W, lane, f"misaligned local access of {t} bytes at {o[lane]}", "misaligned"
                )
            self.fault(
                W,
                lane,
                f"out-of-bounds local access of {t} bytes at offset {o[lane]} "
                f"({W.lmem.shape[1]} bytes)",
                "out-of-bounds",
            )
        return np.where(bad, 0, o // t) if m is None else np.where(m, o // t, 0)

    def local_ld(self):
        def ld(W, addr, m):
            ix = self.local_index(W, addr, m)
            v = W.lview(self.w, self.n)[LANES, ix]
            return v if self.n == 1 else v.T.copy()

        return ld

    def local_st(self):
        def st(W, addr, m, *vals):
            ix = self.local_index(W, addr, m)
            view = W.lview(self.w, self.n)
            val = vals[0] if self.n == 1 else np.stack(vals, 1)
            if m is None:
                view[LANES, ix] = val
            else:
                view[LANES[m], ix[m]] = val[m]

        return st

    def param_ld(self):
        def ld(W, addr, m):
            bank = self.launch.params
            o = (addr + U8(self.off & M64) - U8(PARAM_WIN)).view(S8)
            bad = (o < 0) | (o + self.t > bank.size) | (o % self.t != 0)
            if m is not None:
                bad &= m
            if bad.any():
                lane = int(bad.argmax())
                self.fault(W, lane, f"bad parameter read at offset {int(o[lane])}", "out-of-bounds")
            o = np.where(bad, 0, o) if m is None else np.where(m, o, 0)
            b = bank[o[:, None] + np.arange(self.t)]
            v = np.ascontiguousarray(b).view({1: U1, 2: U2, 4: U4, 8: U8}[self.w])
            return v[:, 0].copy() if self.n == 1 else v.T.copy()

        return ld

    # ------------------------------------------------------------ generic
    def generic(self, store):
        """Dispatch on the address window of the active lanes."""
        glob = self.global_st() if store else self.global_ld()
        shared = self.shared_st() if store else self.shared_ld()
        local = self.local_st() if store else self.local_ld()
        param = self.param_ld()
        w48 = np.full(32, 48, U8)

        def go(W, addr, m, *vals):
            win = (addr + U8(self.off & M64)) >> w48
            first = 0 if m is None else int(m.argmax())
            code = int(win[first])
            same = win == win[first]
            if m is not None:
                same = same | ~m
            if same.all():
                if code == 0:
                    return glob(W, addr, m, *vals)
                a4 = addr.astype(U4)
                if code == 1:
                    return shared(W, a4, m, *vals)
                if code == 2:
                    return local(W, a4, m, *vals)
                if code == 3 and not store:
                    return param(W, addr, m)
                self.resolve(W, addr + U8(self.off & M64), m)
                raise PtxError(f"bad generic address at {self.where}")
            out = None
            act = np.ones(32, bool) if m is None else m
            for c in set(win[act].tolist()):
                mm = act & (win == U8(c))
                r = go(W, np.where(mm, addr, addr[int(mm.argmax())]), mm, *vals)
                if r is not None:
                    out = r.copy() if out is None else np.where(mm, r, out)
            return out

        return go
