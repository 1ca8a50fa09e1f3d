"""A warp: groups of lanes with program counters, and what its instructions do to it."""

import numpy as np

from . import races
from .barriers import Barrier
from .errors import DeadlockError, DeviceTrap, PtxError
from .helpers import ALL, U1, U2, U4, U8, lanes_of, mask_int
from .ops_wgmma import Accum, mat_to_regs, regs_to_mat
from .printf import format_printf

_ALLMASK = np.ones(32, bool)


class Frag:
    """Lanes of a warp that share a program counter."""

    __slots__ = ("mask", "pc", "spins", "wait")

    def __init__(self, pc, mask):
        self.pc, self.mask, self.wait, self.spins = pc, mask, None, 0


def norm(m):
    return None if m.tobytes() == ALL else m


class Warp:
    """Execution state of one warp."""

    def __init__(self, cta, index, lanes_on):
        kc = cta.launch.kc
        self.cta, self.index, self.kc = cta, index, kc
        self.check = cta.launch.check
        self.R = list(cta.launch.reg_init)
        self.live = lanes_on.copy()
        f = Frag(0, norm(lanes_on))
        self.frags = [f]
        self.cur = f
        self.yield_ = False
        self.cc = np.zeros(32, bool)
        self.inflight = {}
        self.wg_open, self.wg_groups = [], []
        self.cp_open, self.cp_groups = [], []
        self.bulk_open, self.bulk_groups = [], []
        self.log = []
        self.lmem = np.zeros((32, max(kc.local_size, 32)), U1)
        self._lv = {}
        self.queued = True
        self.vidx = 0
        self.clocks = None
        self.sp = cta.specials(index)

    # ------------------------------------------------------------ description
    def describe(self):
        return f"kernel {self.kc.name}, block {self.cta.ctaid}, warp {self.index}"

    def describe_lane(self, lane):
        t = [int(self.sp[f"tid.{c}"][lane]) for c in "xyz"]
        return (
            f"kernel {self.kc.name}, block {self.cta.ctaid}, thread {tuple(t)} "
            f"(warp {self.index}, lane {lane})"
        )

    # ------------------------------------------------------------ small services
    def lview(self, w, n):
        v = self._lv.get((w, n))
        if v is None:
            t = w * n
            s = self.lmem.shape[1] // t * t
            v = self.lmem.view({1: U1, 2: U2, 4: U4, 8: U8}[w])
            if n > 1:
                v = v[:, : s // w].reshape(32, s // t, n)
            self._lv[(w, n)] = v
        return v

    def param(self, off, kind):
        return self.cta.launch.param(off, kind)

    def clock(self, name):
        L = self.cta.launch
        L.ticks += 64
        return np.full(32, L.ticks, U8)

    def proxy_fence(self):
        if self.check:
            races.proxy_fence(self)

    def printf(self, m, fmt_off, arg_off):
        L = self.cta.launch
        fa, aa = self.lview(8, 1)[:, fmt_off // 8], self.lview(8, 1)[:, arg_off // 8]
        for l in lanes_of(m):
            fmt = L.mem.cstring(int(fa[l]))
            off = int(aa[l]) & 0xFFFFFFFF
            L.out.append(format_printf(fmt, self.lmem[l], off, L.mem))

    def assertfail(self, m, offs, where):
        if m is not None and not m.any():
            return
        lane = 0 if m is None else int(m.argmax())
        L = self.cta.launch
        v = [int(self.lview(8, 1)[lane, o // 8]) for o in (offs[0], offs[1])]
        line = int(self.lview(4, 1)[lane, offs[2] // 4])
        raise DeviceTrap(
            f"device assertion failed: {L.mem.cstring(v[0])} "
            f"({L.mem.cstring(v[1])}:{line})\n  in {self.describe_lane(lane)}"
        )

    def trap(self, m, where):
        if m is not None and not m.any():
            return
        lane = 0 if m is None else int(m.argmax())
        raise DeviceTrap(f"trap executed\n  in {self.describe_lane(lane)}\n  at {where}")

    def members(self, want, m, where):
        """Check that every live lane named in a member mask takes part."""
        act = mask_int(m)
        missing = want & mask_int(self.live) & ~act
        if missing:
            raise DeadlockError(
                f"warp-synchronous instruction waits for lanes {missing:#010x} that are elsewhere\n"
                f"  in {self.describe()} (active lanes {act:#010x})\n  at {where}\n{self.stand()}"
            )

    def need_full(self, m, where):
        if mask_int(m) != mask_int(self.live) or not self.live.all():
            raise DeadlockError(
                f"instruction needs a converged full warp, active lanes are {mask_int(m):#010x}\n"
                f"  in {self.describe()}\n  at {where}"
            )

    # ------------------------------------------------------------ divergence
    def split(self, q, tgt, nxt):
        f = self.cur
        cur = _ALLMASK if f.mask is None else f.mask
        rest = cur & ~q
        o = self.kc.order
        if o[tgt] <= o[nxt]:
            f.pc, f.mask = tgt, q
            self.add(nxt, rest)
        else:
            f.pc, f.mask = nxt, rest
            self.add(tgt, q)
        return -1

    def add(self, pc, mask):
        """New fragment, merged with a ready one at the same place."""
        for g in self.frags:
            if g.pc == pc and g.wait is None and g is not self.cur:
                g.mask = norm(g.mask | mask)
                return
        self.frags.append(Frag(pc, mask))

    def switch(self, idx, m, targets):
        cur = _ALLMASK if m is None else m
        f = self.cur
        vals = sorted(set(idx[cur].tolist()))
        if len(vals) == 1:
            return targets[vals[0]]
        self.frags.remove(f)
        self.cur = None
        for v in vals:
            self.add(targets[v], norm(cur & (idx == v)))
        return -1

    def exit(self, p, nxt):
        f = self.cur
        cur = _ALLMASK if f.mask is None else f.mask
        gone = cur if p is None else cur & p
        rest = cur & ~gone
        if not gone.any():
            return nxt
        self.live = self.live & ~gone
        if rest.any():
            f.mask = rest
            f.pc = nxt
        else:
            self.frags.remove(f)
            self.cur = None
        if not self.frags:
            self.finish()
        self.cta.lanes_exited(int(gone.sum()))
        return -1

    def finish(self):
        """Checks at warp exit."""
        if self.check:
            races.flush(self)
            for name, open_, groups in (
                ("cp.async", self.cp_open, self.cp_groups),
                ("bulk store", self.bulk_open, self.bulk_groups),
                ("wgmma", self.wg_open, self.wg_groups),
            ):
                ops = [o for g in groups for o in g] + list(open_)
                if ops:
                    if name == "bulk store":
                        for o in ops:
                            o.land()
                    self.cta.launch.warn(
                        f"{len(ops)} {name} operation(s) not waited for when "
                        f"warp {self.index} of block {self.cta.ctaid} exits"
                    )
        for g in [*self.bulk_groups, self.bulk_open]:
            for o in g:
                o.land()

    def wake(self, f):
        f.wait = None
        if not self.queued:
            self.queued = True
            self.cta.launch.ready.append(self)

    # ------------------------------------------------------------ running
    def run(self, budget):
        """Run until blocked, finished, yielding, or out of budget; True if still ready."""
        kc, R = self.kc, self.R
        blocks, order, cnt = kc.funcs, kc.order, self.cta.launch.counts
        while budget > 0:
            frags = self.frags
            if len(frags) == 1:
                f = frags[0]
                if f.wait is not None:
                    return False
                self.cur = f
                self.yield_ = False
                m = f.mask
                pc = f.pc
                while True:
                    f.pc = pc
                    cnt[pc] += 1
                    budget -= 1
                    pc = blocks[pc](self, R, m)
                    if pc < 0:
                        break
                    if self.yield_ or budget <= 0:
                        f.pc = pc
                        return True
                continue
            if not frags:
                return False
            best = bk = None
            for g in frags:
                if g.wait is None:
                    k = (g.spins >> 6, order[g.pc])
                    if best is None or k < bk:
                        best, bk = g, k
            if best is None:
                return False
            f = best
            self.cur = f
            self.yield_ = False
            cnt[f.pc] += 1
            budget -= 1
            pc = blocks[f.pc](self, R, f.mask)
            if pc >= 0:
                f.pc = pc
            if self.cur is f and f.wait is None:
                f.spins = f.spins + 1 if self.yield_ else f.spins
                pc = f.pc
                for g in frags:
                    if g is not f and g.pc == pc and g.wait is None and g in self.frags:
                        g.mask = norm(
                            (_ALLMASK if g.mask is None else g.mask)
                            | (_ALLMASK if f.mask is None else f.mask)
                        )
                        g.spins = 0
                        self.frags.remove(f)
                        break
            if self.yield_:
                return True
        return True

    # ------------------------------------------------------------ barriers
    def guarded_bar(self, p, m, nxt, mode, ident, count, red, aligned, where):
        if p is not None and not p.any():
            return nxt
        cur = _ALLMASK if m is None else m
        if p is not None and (cur & ~p).any():
            rest = cur & ~p
            self.cur.mask = norm(cur & p)
            self.add(nxt, rest)
        self.cur.pc = self.cur.pc
        self.bar(self.cur.mask, nxt, mode, ident, count, red, aligned, where)
        return -1

    def bar(self, m, nxt, mode, ident, count, red, aligned, where):
        if ident > 15:
            raise PtxError(f"barrier id {ident} out of range at {where}")
        if count % 32:
            raise PtxError(f"barrier thread count {count} is not a multiple of 32 at {where}")
        cta = self.cta
        f = self.cur
        lanes = mask_int(m)
        whole = lanes == mask_int(self.live)
        b = cta.bars.setdefault(ident, Barrier(ident))
        if b.arrivals and b.count != count:
            raise DeadlockError(
                f"barrier {ident} used with {count} and {b.count} threads at once\n"
                f"  at {where}\n  and {b.arrivals[0][2]}"
            )
        b.count = count
        if self.check:
            v = races.release(self)
            b.vc = v if b.vc is None else np.maximum(b.vc, v)
        n = bin(lanes).count("1")
        if not whole and aligned:
            for W2, _l2, wh in b.arrivals:
                if W2 is self and wh != where:
                    raise DeadlockError(
                        f"barrier divergence: lanes of one warp wait at different barrier "
                        f"instructions\n  in {self.describe()}\n  at {where}\n  and {wh}"
                    )
        b.arrivals.append((self, lanes, where))
        b.lanes += n
        b.threads += 32 if whole else n
        if whole and any(W2 is self and l2 != lanes for W2, l2, _ in b.arrivals):
            b.threads -= 32 - n
        if red is not None:
            cur = _ALLMASK if m is None else m
            b.red.append(red[2][cur])
        if count and b.threads > count:
            raise DeadlockError(
                f"barrier {ident}: {b.threads} threads arrived, only {count} "
                f"expected\n  in {self.describe()}\n  at {where}"
            )
        if mode != "arrive":
            f.wait = ("barrier", ident, where, aligned and not whole)
            b.waiters.append((self, f, nxt, red, m))
            cta.try_release(b)
            return -1
        if cta.try_release(b):
            pass
        f.pc = nxt
        return nxt

    # ------------------------------------------------------------ clusters
    def cluster_arrive(self, m, where):
        cl = self.cta.clbar
        if self.check:
            v = races.release(self)
            cl.vc = v if cl.vc is None else np.maximum(cl.vc, v)
        cl.arrived += bin(mask_int(m) & mask_int(self.live)).count("1")
        cl.check()

    def cluster_wait(self, m, nxt, where):
        cl = self.cta.clbar
        mine = getattr(self, "cl_phase", 0)
        f = self.cur
        self.cl_phase = mine + 1
        if cl.phase > mine:
            if self.check:
                races.acquire(self, cl.done_vc)
            return nxt
        f.wait = ("cluster barrier", None, where)
        cl.waiters.append((self, f, nxt))
        return -1

    # ------------------------------------------------------------ strong accesses
    def _keys(self, addr, m, off, sp):
        out = set()
        for l in lanes_of(m):
            a = int(addr[l]) + off
            if sp == "generic":
                if a >> 48 != 1:
                    continue
                a &= 0xFFFFFFFF
            out.add(a)
        return out

    def strong_acquire(self, addr, m, off, sp, both=False):
        if not self.check:
            return
        for a in self._keys(addr, m, off, sp):
            races.acquire(self, self.cta.sync_vc.get(a))
        if both:
            self.strong_release(addr, m, off, sp)

    def strong_release(self, addr, m, off, sp):
        if not self.check:
            return
        ks = self._keys(addr, m, off, sp)
        if not ks:
            return
        v = races.release(self)
        for a in ks:
            o = self.cta.sync_vc.get(a)
            self.cta.sync_vc[a] = v if o is None else np.maximum(o, v)

    # ------------------------------------------------------------ wgmma
    def wg_issue(self, op, a, b, scale_d):
        """Queue a wgmma; its accumulator registers are in flight until a wait."""
        R = self.R
        d = op.dregs
        acc = None
        e = self.inflight.get(d[0])
        if e is not None:
            acc = e[0]
            if any(self.inflight.get(r) != (acc, k) for k, r in enumerate(d)):
                raise PtxError(
                    f"wgmma accumulator registers overlap another one in flight\n"
                    f"  in {self.describe()}\n  at {op.site.where}"
                )
        else:
            acc = Accum(op.n, op.f16)
            if scale_d:
                regs = [R[r].view(U4) for r in d]
                mat = regs_to_mat(regs, op.n, op.f16)
                if not op.f16:
                    mat = np.ascontiguousarray(mat).view(np.int32 if op.dt == "s32" else np.float32)
                acc.mat = mat
            acc.targets = [[r] for r in d]
            pz = self.cta.launch.poison4
            for k, r in enumerate(d):
                self.inflight[r] = (acc, k)
                R[r] = pz if op.dkinds[k] == "u4" else pz.view(np.float32)
        acc.pending += 1
        self.wg_open.append((op, acc, a, b, scale_d))

    def wg_alias(self, d, s):
        """``mov`` of an accumulator register that is in flight."""
        acc, k = self.inflight[s]
        old = self.inflight.get(d)
        if old is not None and d in old[0].targets[old[1]]:
            old[0].targets[old[1]].remove(d)
        acc.targets[k].append(d)
        self.inflight[d] = (acc, k)
        self.R[d] = (
            self.cta.launch.poison4.view(self.R[d].dtype)
            if self.R[d] is not None
            else self.cta.launch.poison4
        )

    def wg_commit(self):
        self.wg_groups.append(self.wg_open)
        self.wg_open = []

    def wg_wait(self, n):
        while len(self.wg_groups) > n:
            for op, acc, a, b, sd in self.wg_groups.pop(0):
                op.run(self, acc, a, b, sd)
                acc.pending -= 1
                if acc.pending == 0:
                    self._wg_land(acc)

    def wg_force(self, where):
        """An accumulator in flight is unpacked: complete everything, as ptxas does."""
        self.cta.launch.warn(
            f"wgmma is serialised: an accumulator is unpacked before its wait at {where[:120]}"
        )
        self.wg_commit()
        self.wg_wait(0)

    def _wg_land(self, acc):
        regs = mat_to_regs(acc.mat, acc.n, acc.f16)
        kinds = self.kc.reg_kinds
        for k, ts in enumerate(acc.targets):
            v = regs[k].view(U4)
            for r in ts:
                if self.inflight.get(r) == (acc, k):
                    del self.inflight[r]
                    self.R[r] = v.view(np.float32) if kinds[r] == "f4" else v

    # ------------------------------------------------------------ status
    def stand(self):
        """Where every lane group of this warp stands."""
        o = []
        for f in self.frags:
            blk = self.kc.blocks[f.pc]
            ins = (
                blk.term
                if f.wait is not None and f.wait[0] != "mbarrier" and blk.term
                else blk.ins[0]
            )
            what = "runnable" if f.wait is None else f"waiting on {f.wait[0]}"
            if f.wait is not None and f.wait[0] == "barrier":
                b = self.cta.bars[f.wait[1]]
                what += (
                    f" {f.wait[1]} ({b.lanes} threads arrived, {b.count or self.cta.live} expected)"
                )
            if f.wait is not None and f.wait[0] == "mbarrier":
                mb = f.wait[1]
                what += (
                    f" at shared offset {mb.off} (phase {mb.phase}, {mb.pending} of "
                    f"{mb.expected} arrivals and {mb.tx} bytes outstanding)"
                )
            o.append(
                f"    block {self.cta.ctaid} warp {self.index} lanes {mask_int(f.mask):#010x}: "
                f"{what} at {self.kc.where_text(ins)}"
            )
        return "\n".join(o)
