"""One kernel launch: its arguments, memory, CTAs and counters."""

import ctypes
import functools
import math
import multiprocessing as mp
import random
import shutil
import struct
import subprocess
import time

import numpy as np

from . import metrics as met
from . import sched
from .barriers import ClusterBarrier
from .codegen import DT
from .errors import PtxError
from .helpers import U1, U4
from .memory import HostBuffers, Memory, is_torch
from .tma import TensorMap


class Struct:
    """A by-value struct argument with device pointers inside.

    ``data`` is ``bytes`` or a ctypes structure; ``pointers`` maps byte offsets to arrays
    (whose device address is written there) or to :class:`TensorMap` objects (128 bytes).
    """

    def __init__(self, data, pointers=None):
        self.data = bytes(data)
        self.pointers = dict(pointers or {})


@functools.cache
def demangle(name):
    """C++ name of a symbol, if ``c++filt`` is at hand."""
    if name.startswith("_Z") and shutil.which("c++filt"):
        r = subprocess.run(["c++filt", name], capture_output=True, text=True)
        return r.stdout.strip() or name
    return name


def dim3(d):
    if isinstance(d, int):
        return (d, 1, 1)
    d = tuple(int(x) for x in d)
    return d + (1,) * (3 - len(d))


class Launch:
    """State of one kernel launch."""

    def __init__(
        self,
        module,
        kc,
        grid,
        block,
        args,
        smem_bytes,
        cluster,
        seed,
        check,
        metrics_on,
        quantum,
        spin_limit,
        shared_mem,
        names,
    ):
        self.module, self.kc, self.grid, self.block = module, kc, grid, block
        kinds = {"race", "uninit"} if check is True else set(check or ())
        if kinds - {"race", "uninit", "async"}:
            raise PtxError(f"unknown checks {sorted(kinds)}: use 'race', 'uninit', 'async'")
        self.check, self.metrics_on = bool(kinds), metrics_on
        self.check_race, self.check_uninit = "race" in kinds, "uninit" in kinds
        self.rng = random.Random(seed)
        self.quantum, self.spin_limit = quantum, spin_limit
        self.counts = [0] * len(kc.blocks)
        self.progress = self.ticks = self.async_ops = 0
        self.ready, self.out, self.warnings = [], [], []
        self.tm_cache = {}
        self.poison4 = np.full(32, 0xFFFFFFFF, U4)
        attrs = kc.fn.attrs
        nthreads = block[0] * block[1] * block[2]
        if nthreads < 1 or nthreads > 1024 or min(grid) < 1:
            raise PtxError(f"bad launch shape: grid {grid}, block {block}")
        for a in ("maxntid", "reqntid"):
            if a in attrs and isinstance(attrs[a], list):
                lim = math.prod(attrs[a])
                if nthreads > lim or (a == "reqntid" and nthreads != lim):
                    raise PtxError(
                        f"kernel {kc.name} declares .{a} {attrs[a]}, launched with {block}"
                    )
        if cluster is None:
            cluster = attrs.get("reqnctapercluster") or attrs.get("explicitcluster") or (1, 1, 1)
            if cluster is True:
                cluster = (1, 1, 1)
        self.cluster_dims = dim3(cluster)
        self.explicit_cluster = math.prod(self.cluster_dims) > 1
        for g, c in zip(grid, self.cluster_dims):
            if g % c:
                raise PtxError(f"grid {grid} is not a multiple of the cluster {self.cluster_dims}")
        self.smem_total = (kc.dyn_shared_off + smem_bytes) if smem_bytes else kc.static_shared
        self.smem_total = max(self.smem_total, 0)
        self.smem_bytes = smem_bytes
        if self.smem_total > 232448:
            raise PtxError(f"{self.smem_total} bytes of shared memory exceed 232448")
        self.mem = Memory(shared_mem)
        self.mem.next = module._next
        for a in module._globals.values():
            a.rows = a.rows
            a.touched_r = a.touched_w = None
            self.mem.bases.append(a.base)
            self.mem.allocs.append(a)
        self.metrics = met.Collector(self)
        self._marshal(args, names)
        for s in kc.sites:
            s.reset(self)
        self._pcache = {}
        self.reg_init = []
        for r in kc.fn.regs:
            k = kc.kind[r]
            if k == "b":
                self.reg_init.append(np.zeros(32, bool))
            elif k == "q":
                self.reg_init.append(np.zeros((32, 2), np.uint64))
            else:
                w = int(k[1:])
                self.reg_init.append(np.full(32, (1 << (8 * w)) - 1, DT[f"u{w}"]).view(DT[k]))
        u = {}
        for c, b, g, q in zip("xyz", block, grid, self.cluster_dims):
            u[f"ntid.{c}"], u[f"nctaid.{c}"] = b, g
            u[f"cluster_nctaid.{c}"], u[f"nclusterid.{c}"] = q, g // q
        u["cluster_nctarank"] = math.prod(self.cluster_dims)
        u["is_explicit_cluster"] = int(self.explicit_cluster)
        u["nwarpid"] = (nthreads + 31) // 32
        u["nsmid"] = 132
        u["dynamic_smem_size"] = smem_bytes
        u["total_smem_size"] = u["aggr_smem_size"] = self.smem_total
        d = {k: np.full(32, v, U4) for k, v in u.items()}
        lane = np.arange(32, dtype=np.uint64)
        one = np.uint64(1)
        d["laneid"] = lane.astype(U4)
        d["lanemask_eq"] = (one << lane).astype(U4)
        d["lanemask_lt"] = ((one << lane) - one).astype(U4)
        d["lanemask_le"] = ((one << (lane + one)) - one).astype(U4)
        d["lanemask_gt"] = ~d["lanemask_le"]
        d["lanemask_ge"] = ~d["lanemask_lt"]
        d["gridid"] = np.zeros(32, np.uint64)
        self.uniform_specials = d

    def warn(self, text):
        if len(self.warnings) < 20:
            self.warnings.append(text)

    # ------------------------------------------------------------ arguments
    def _marshal(self, args, names):
        params = self.kc.entry.params
        args = list(args)
        if len(args) != len(params):
            raise PtxError(
                f"kernel {demangle(self.kc.name)} takes {len(params)} arguments, {len(args)} given"
            )
        hb = self.host = HostBuffers(self.mem)

        def name_of(k):
            return names[k] if names else f"argument {k}"

        for k, a in enumerate(args):
            if isinstance(a, np.ndarray) and a.ndim == 0:
                continue
            if isinstance(a, np.ndarray) or is_torch(a):
                hb.add(a, name_of(k))
            elif isinstance(a, TensorMap):
                hb.add(a.array, name_of(k))
            elif isinstance(a, Struct):
                for o, x in a.pointers.items():
                    hb.add(x.array if isinstance(x, TensorMap) else x, f"{name_of(k)}+{o}")
        hb.commit()
        bank = bytearray(self.kc.param_size)
        for k, (p, a) in enumerate(zip(params, args)):
            off = self.kc.param_off[p.name]
            raw = self._encode(p, a, hb, name_of(k))
            if len(raw) > p.size:
                raise PtxError(f"{name_of(k)} is {len(raw)} bytes, parameter holds {p.size}")
            bank[off : off + len(raw)] = raw
        self.params = np.frombuffer(bytes(bank) + b"\0" * 16, U1)[: len(bank)]

    def _encode(self, p, a, hb, name):
        if a is None:
            return b"\0" * p.size
        if (
            (isinstance(a, np.ndarray) and a.ndim > 0)
            or (is_torch(a) and a.ndim > 0)
            or (is_torch(a) and p.size == 8 and p.type in ("u64", "b64"))
        ):
            if p.size != 8:
                raise PtxError(f"{name}: array given for a {p.size}-byte parameter")
            return struct.pack("<Q", hb.address(a))
        if isinstance(a, TensorMap):
            enc = a.encode(hb.address(a.array))
            if p.size == 128:
                return enc
            al = self.mem.alloc(128, name + " (tensor map)")
            al.buf[:128] = np.frombuffer(enc, U1)
            return struct.pack("<Q", al.base)
        if isinstance(a, Struct):
            b = bytearray(a.data)
            for o, x in a.pointers.items():
                if isinstance(x, TensorMap):
                    b[o : o + 128] = x.encode(hb.address(x.array))
                else:
                    b[o : o + 8] = struct.pack("<Q", hb.address(x))
            return bytes(b)
        if isinstance(a, (bytes, bytearray, ctypes.Structure, ctypes.Array)):
            return bytes(a)
        if is_torch(a):
            a = a.item()
        if isinstance(a, np.ndarray):
            a = a[()]
        if isinstance(a, np.generic):
            if p.type in ("f32", "f64"):
                a = float(a)
            else:
                raw = a.tobytes()
                if len(raw) >= p.size:
                    return raw[: p.size]
                return int(a).to_bytes(p.size, "little", signed=int(a) < 0)
        if isinstance(a, bool):
            a = int(a)
        if p.type == "f32" or (isinstance(a, float) and p.size == 4):
            return struct.pack("<f", a)
        if p.type == "f64" or isinstance(a, float):
            return struct.pack("<d", a)
        return (int(a) & ((1 << (8 * p.size)) - 1)).to_bytes(p.size, "little")

    def param(self, off, kind):
        """A kernel parameter, broadcast to 32 lanes."""
        key = (off, kind)
        v = self._pcache.get(key)
        if v is None:
            dt = np.dtype(DT[kind])
            x = np.frombuffer(self.params[off : off + dt.itemsize].tobytes(), dt)[0]
            v = self._pcache[key] = np.full(32, x, dt)
            v.flags.writeable = False
        return v

    # ------------------------------------------------------------ running
    def make_group(self, base):
        """The CTAs of one cluster whose first CTA is ``base``."""
        from .races import Clocks, Shadow

        cx, cy, cz = self.cluster_dims
        ctas, cl = [], {}
        for z in range(cz):
            for y in range(cy):
                for x in range(cx):
                    r = x + cx * (y + cy * z)
                    c = sched.CTA(self, (base[0] + x, base[1] + y, base[2] + z), r, cl)
                    cl[r] = c
                    ctas.append(c)
        nw = sum(len(c.warps) for c in ctas)
        clocks = Clocks(nw, len(ctas)) if self.check else None
        bar = ClusterBarrier()
        bar.live = sum(c.live for c in ctas)
        k = 0
        for c in ctas:
            c.clbar = bar
            c.agent_index = nw + c.rank
            for w in c.warps:
                w.vidx, w.clocks = k, clocks
                k += 1
            if self.check:
                c.shadow = Shadow(c, self.smem_total, self.kc.granule, clocks.n)
        return ctas

    def groups(self):
        cx, cy, cz = self.cluster_dims
        gx, gy, gz = self.grid
        return [
            (x, y, z) for z in range(0, gz, cz) for y in range(0, gy, cy) for x in range(0, gx, cx)
        ]

    def run_groups(self, groups, coresident, schedule):
        with np.errstate(all="ignore"):
            if coresident:
                sched.run_ctas(self, [c for b in groups for c in self.make_group(b)], schedule)
            else:
                for b in groups:
                    sched.run_ctas(self, self.make_group(b), schedule)
        met.site_stats(self.metrics, self.kc)

    def run(self, coresident, schedule, procs):
        t0 = time.perf_counter()
        groups = self.groups()
        try:
            if procs > 1 and not coresident and not self.kc.has_global_atomics and len(groups) > 1:
                self._run_procs(groups, schedule, procs)
            else:
                self.run_groups(groups, coresident, schedule)
        finally:
            self.host.write_back()
        r = met.build(self, self.counts)
        r.kernel = demangle(self.kc.name)
        r.grid, r.block = self.grid, self.block
        r.dynamic_shared = self.smem_bytes
        r.seconds = time.perf_counter() - t0
        r.max_live_threads = (
            math.prod(self.block)
            * math.prod(self.cluster_dims)
            * (len(groups) if coresident else 1)
        )
        r.printed = "".join(self.out)
        r.warnings = list(dict.fromkeys(self.warnings))
        return r

    def _run_procs(self, groups, schedule, procs):
        """Fork workers over disjoint block lists; global memory is shared."""
        for a in self.mem.allocs:
            a.share_touched()
        ctx = mp.get_context("fork")
        work = []
        for k in range(procs):
            rd, wr = ctx.Pipe(False)
            part = groups[k::procs]
            if not part:
                continue
            p = ctx.Process(target=self._worker, args=(wr, part, schedule, k))
            p.start()
            wr.close()
            work.append((p, rd))
        err = None
        for p, rd in work:
            try:
                kind, val = rd.recv()
            except EOFError:
                kind, val = "error", PtxError("worker process died")
            p.join()
            if kind == "error":
                err = err or val
                continue
            counts, g, s, tb, out, warn = val
            self.counts = [a + b for a, b in zip(self.counts, counts)]
            for mine, theirs in ((self.metrics.g, g), (self.metrics.s, s)):
                for sid, v in theirs.items():
                    e = mine.setdefault(sid, [0, 0, 0])
                    for i in range(3):
                        e[i] += v[i]
            self.metrics.tma_bytes = [a + b for a, b in zip(self.metrics.tma_bytes, tb)]
            self.out += out
            self.warnings += warn
        if err:
            raise err

    def _worker(self, wr, groups, schedule, k):
        import os

        try:
            self.rng.seed(self.rng.random() + k)
            self.run_groups(groups, False, schedule)
            m = self.metrics
            wr.send(("ok", (self.counts, m.g, m.s, m.tma_bytes, self.out, self.warnings)))
        except Exception as e:
            try:
                wr.send(("error", e))
            except Exception:
                wr.send(("error", PtxError(str(e))))
        wr.close()
        os._exit(0)
