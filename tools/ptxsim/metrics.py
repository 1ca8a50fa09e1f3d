"""Deterministic counters: instruction mix, memory coalescing, bank conflicts, hot lines."""

from dataclasses import dataclass, field

import numpy as np

CLASSES = (
    "mma",
    "ldmatrix",
    "global_ld",
    "global_st",
    "shared_ld",
    "shared_st",
    "cp_async",
    "tma",
    "atomic",
    "integer",
    "float",
    "special",
    "convert",
    "shuffle",
    "barrier",
    "control",
    "local",
    "move",
    "other",
)
_F = {"f16", "bf16", "f16x2", "bf16x2", "f32", "f64", "f32x2"}


def classify(i):
    """Instruction class used by the counters."""
    op, ms = i.op, i.modset
    if op == "mma" or (op == "wmma" and "mma" in ms) or (op == "wgmma" and "mma_async" in ms):
        return "mma"
    if op in ("ldmatrix", "stmatrix", "movmatrix", "wmma"):
        return "ldmatrix"
    if op == "cp":
        return "tma" if "bulk" in ms else "cp_async"
    if op in ("ld", "ldu", "st"):
        sp = next(
            (
                m.split("::")[0]
                for m in i.mods
                if m.split("::")[0] in ("global", "shared", "local", "param", "const")
            ),
            "global",
        )
        if sp == "shared":
            return "shared_st" if op == "st" else "shared_ld"
        if sp == "local":
            return "local"
        if sp in ("param", "const"):
            return "other"
        return "global_st" if op == "st" else "global_ld"
    if op in ("atom", "red"):
        return "atomic"
    if op in ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"):
        return "special"
    if op in ("shfl", "vote", "match", "redux", "activemask", "elect"):
        return "shuffle"
    if op in ("bar", "barrier", "mbarrier", "membar", "fence") or op == "wgmma":
        return "barrier"
    if op in ("bra", "brx", "exit", "ret", "call", "trap"):
        return "control"
    if op == "cvt":
        return "convert"
    if op in ("mov", "selp", "cvta", "slct", "prmt"):
        return "move"
    if op in (
        "setp",
        "set",
        "min",
        "max",
        "abs",
        "neg",
        "add",
        "sub",
        "mul",
        "mad",
        "fma",
        "div",
        "copysign",
        "testp",
    ):
        return "float" if ms & _F else "integer"
    if op in (
        "and",
        "or",
        "xor",
        "not",
        "shl",
        "shr",
        "shf",
        "lop3",
        "bfe",
        "bfi",
        "bfind",
        "brev",
        "popc",
        "clz",
        "rem",
        "sad",
        "dp4a",
        "dp2a",
        "addc",
        "subc",
        "madc",
        "mul24",
        "mad24",
        "cnot",
        "fns",
    ):
        return "integer"
    return "other"


def mma_flops(i):
    """Floating-point (or integer) operations of one warp-level mma instruction."""
    import re

    for m in i.mods:
        r = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", m)
        if r:
            a, b, c = map(int, r.groups())
            f = 2 * a * b * c
            return f // 4 if i.op == "wgmma" else f
    return 0


class Collector:
    """Accumulates per-site memory statistics during a launch."""

    def __init__(self, launch):
        self.launch = launch
        self.g = {}  # site id -> [requests, bytes, sectors]
        self.s = {}  # site id -> [requests, wavefronts, ideal]
        self.tma_bytes = [0, 0]

    def flush(self, site):
        """Process the recorded addresses of a site."""
        rec, site.rec = site.rec, []
        if not rec:
            return
        nact, site.nact = site.nact, 0
        a = np.stack(rec)
        sp = site.space
        if sp == "generic":
            sp = "shared" if int(a[0, 0]) >> 48 == 1 or a.dtype == np.uint32 else "global"
        if sp in ("global", "const"):
            self._global(site, a.astype(np.uint64), nact)
        elif sp == "shared":
            self._shared(site, a.astype(np.int64) + site.off)

    def _global(self, site, a, nact):
        sec = np.sort(a >> np.uint64(5), axis=1)
        n = a.shape[0] + int((sec[:, 1:] != sec[:, :-1]).sum())
        e = self.g.setdefault(site.id, [0, 0, 0])
        e[0] += a.shape[0]
        e[1] += nact * site.t
        e[2] += n
        mem = self.launch.mem
        flat = a.ravel()
        bases = np.array(mem.bases, np.uint64)
        which = np.searchsorted(bases, flat, side="right") - 1
        for k in np.unique(which).tolist():
            if k < 0:
                continue
            al = mem.allocs[k]
            o = ((flat[which == k] - np.uint64(al.base)) >> np.uint64(site.s)).astype(np.int64)
            is_atomic = site.ins.op in ("atom", "red")
            w, c = site.w, site.n
            one = {1: 1, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}[w]
            if not site.write or is_atomic:
                al.touched(False)[(w, c)][o] = one
            if site.write:
                al.touched(True)[(w, c)][o] = one

    def _shared(self, site, a):
        t = 16 if site.ins.op in ("ldmatrix", "stmatrix") else site.t
        n = a.shape[0]
        if site.ins.op in ("ldmatrix", "stmatrix"):
            k = getattr(site, "ldm", 4)
            a = a[:, : 8 * k].reshape(-1, 8)
            words = 4
        elif t <= 4:
            words = 1
        elif t == 8:
            a = a.reshape(-1, 16)
            words = 2
        else:
            a = a.reshape(-1, 8)
            words = 4
        w = a >> 2
        if words > 1:
            w = (w[:, :, None] + np.arange(words)).reshape(a.shape[0], -1)
        w = np.sort(w, axis=1)
        first = np.ones(w.shape, bool)
        first[:, 1:] = w[:, 1:] != w[:, :-1]
        bank = (w & 31) + np.arange(w.shape[0])[:, None] * 32
        cnt = np.bincount(bank[first], minlength=w.shape[0] * 32).reshape(-1, 32)
        waves = int(cnt.max(1).sum())
        ideal = int(((first.sum(1) + 31) // 32).sum())
        e = self.s.setdefault(site.id, [0, 0, 0])
        e[0] += n
        e[1] += waves
        e[2] += ideal


@dataclass
class LaunchReport:
    """Counters of one launch; see :meth:`table`."""

    kernel: str = ""
    grid: tuple = ()
    block: tuple = ()
    static_shared: int = 0
    dynamic_shared: int = 0
    seconds: float = 0.0
    warp_instructions: int = 0
    classes: dict = field(default_factory=dict)
    tensor_flops: int = 0
    global_load_requests: int = 0
    global_store_requests: int = 0
    global_bytes_requested: int = 0
    global_sectors: int = 0
    unique_bytes_read: int = 0
    unique_bytes_written: int = 0
    tma_bytes_loaded: int = 0
    tma_bytes_stored: int = 0
    shared_requests: int = 0
    shared_wavefronts: int = 0
    shared_ideal_wavefronts: int = 0
    max_live_threads: int = 0
    lines: dict = field(default_factory=dict)
    touched: dict = field(default_factory=dict)
    printed: str = ""
    warnings: list = field(default_factory=list)
    memory_sites: list = field(default_factory=list)

    @property
    def coalescing(self):
        """Requested bytes over bytes of 32-byte sectors moved (1.0 is perfect)."""
        return (
            self.global_bytes_requested / (32 * self.global_sectors) if self.global_sectors else 0.0
        )

    @property
    def bank_conflicts(self):
        """Shared-memory wavefronts beyond the conflict-free minimum."""
        return self.shared_wavefronts - self.shared_ideal_wavefronts

    @property
    def speed(self):
        """Warp instructions emulated per second."""
        return self.warp_instructions / self.seconds if self.seconds else 0.0

    def table(self, lines=10):
        """A printable summary."""
        o = [f"kernel {self.kernel}  grid {self.grid}  block {self.block}"]

        def row(k, v):
            o.append(f"  {k:<34} {v}")

        row("warp instructions", f"{self.warp_instructions:,}")
        for c in CLASSES:
            if self.classes.get(c):
                row("  " + c, f"{self.classes[c]:,}")
        row("tensor-core operations", f"{self.tensor_flops:,}")
        row(
            "global requests (ld/st)",
            f"{self.global_load_requests:,} / {self.global_store_requests:,}",
        )
        row("global bytes requested", f"{self.global_bytes_requested:,}")
        row(
            "global 32-byte sectors", f"{self.global_sectors:,}  (efficiency {self.coalescing:.0%})"
        )
        row(
            "unique bytes read / written",
            f"{self.unique_bytes_read:,} / {self.unique_bytes_written:,}",
        )
        if self.tma_bytes_loaded or self.tma_bytes_stored:
            row(
                "TMA bytes loaded / stored",
                f"{self.tma_bytes_loaded:,} / {self.tma_bytes_stored:,}",
            )
        row(
            "shared wavefronts",
            f"{self.shared_wavefronts:,}  (conflict-free minimum "
            f"{self.shared_ideal_wavefronts:,}, conflicts {self.bank_conflicts:,})",
        )
        row("shared memory static + dynamic", f"{self.static_shared} + {self.dynamic_shared}")
        row("max live threads", self.max_live_threads)
        row("emulation", f"{self.seconds:.2f} s, {self.speed:,.0f} warp instructions/s")
        if self.lines and lines:
            o.append("  hottest source lines (warp instructions):")
            for k, v in sorted(self.lines.items(), key=lambda kv: -kv[1])[:lines]:
                o.append(f"    {v:>10,}  {k}")
        worst = [s for s in self.memory_sites if s["excess"] > 0]
        if worst and lines:
            o.append("  worst memory accesses:")
            for s in sorted(worst, key=lambda s: -s["excess"])[:lines]:
                o.append(f"    {s['what']}: {s['where'][:110]}")
        for w in self.warnings:
            o.append("  warning: " + w)
        return "\n".join(o)


def hot_line(kc, i):
    """``file:line`` to charge: the call site when the code is inlined from a toolkit header."""
    files, loc = kc.module.ast.files, i.loc
    f, line = files.get(loc[0], "?"), loc[1]
    if len(loc) == 4 and "/include/" in f and "/targets/" in f:
        f, line = files.get(loc[2], "?"), loc[3]
    return f"{f.rsplit('/', 1)[-1]}:{line}"


def site_stats(col, kc):
    """Flush every site and return raw per-site statistics."""
    for s in kc.sites:
        if s.rec:
            col.flush(s)


def build(launch, counts):
    """Assemble the report from block execution counts and site statistics."""
    kc, col = launch.kc, launch.metrics
    r = LaunchReport(kernel=kc.name, static_shared=kc.static_shared)
    lines = {}
    for b, n, cl in zip(kc.blocks, counts, kc.block_classes):
        if not n:
            continue
        for c, k in cl.items():
            r.classes[c] = r.classes.get(c, 0) + k * n
        for i in b.ins:
            r.warp_instructions += n
            if i.op in ("mma", "wgmma") or (i.op == "wmma" and "mma" in i.modset):
                r.tensor_flops += n * mma_flops(i)
            if i.loc:
                key = hot_line(kc, i)
            else:
                key = f"PTX line {i.line}"
            lines[key] = lines.get(key, 0) + n
    r.lines = lines
    for sid, (nreq, nb, sec) in col.g.items():
        s = kc.sites[sid]
        if s.write and s.ins.op not in ("atom", "red"):
            r.global_store_requests += nreq
        else:
            r.global_load_requests += nreq
        r.global_bytes_requested += nb
        r.global_sectors += sec
        ideal = max(nreq, (nb + 31) // 32)
        r.memory_sites.append(
            dict(
                kind="global",
                where=s.where,
                requests=nreq,
                bytes=nb,
                sectors=sec,
                excess=sec - ideal,
                what=f"global {sec / nreq:.1f} sectors/request, {nb / (32 * sec):.0%} efficient",
            )
        )
    for sid, (nreq, wv, ideal) in col.s.items():
        s = kc.sites[sid]
        r.shared_requests += nreq
        r.shared_wavefronts += wv
        r.shared_ideal_wavefronts += ideal
        r.memory_sites.append(
            dict(
                kind="shared",
                where=s.where,
                requests=nreq,
                wavefronts=wv,
                ideal=ideal,
                excess=wv - ideal,
                what=f"shared {wv / nreq:.1f} wavefronts/request (minimum {ideal / nreq:.1f})",
            )
        )
    for al in launch.mem.allocs:
        rd = int(al.touched_r.buf[: al.size].sum()) if al.touched_r is not None else 0
        wr = int(al.touched_w.buf[: al.size].sum()) if al.touched_w is not None else 0
        r.unique_bytes_read += rd
        r.unique_bytes_written += wr
        if rd or wr:
            r.touched[al.name] = (rd, wr)
    r.tma_bytes_loaded, r.tma_bytes_stored = col.tma_bytes
    return r
