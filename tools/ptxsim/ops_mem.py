"""Emitters for loads, stores, atomics, fences, barriers, calls and control hints."""

from .access import Site
from .atomics import ATOMS, BF_ATOMS, atomic
from .emitters import DT, TYPE_KIND, TYPE_SIZES, itype, op
from .helpers import F2, U2
from .syntax import Imm, Reg, Sym, Vec

_SPACES = ("global", "shared", "local", "param", "const")


def space_of(ins):
    """State space of a memory instruction ('generic' when none is written)."""
    for m in ins.mods:
        b = m.split("::")[0]
        if b in _SPACES:
            return b
    return "generic"


def vec_of(ins):
    return next((int(m[1:]) for m in ins.mods if m in ("v2", "v4", "v8")), 1)


def base_expr(g, a, space):
    """(base expression, constant offset) of an address operand."""
    k = "u4" if space in ("shared", "local") else "u8"
    b = a.base
    if isinstance(b, Reg):
        if g.imm_of(b) is not None:
            return g.kc.const(k, 0), g.imm_of(b) + a.off
        return g.src(b, k), a.off
    if isinstance(b, Imm):
        return g.kc.const(k, 0), b.value + a.off
    if isinstance(b, Sym):
        kc = g.kc
        if space == "local" or (space == "param" and b.name in kc.local_off):
            return kc.const("u4", kc.local_off[b.name]), a.off
        return g.src(b, k), a.off
    return g.src(b, k), a.off


def addr_expr(g, a, space):
    """Full address expression including the offset."""
    k = "u4" if space in ("shared", "local") else "u8"
    e, off = base_expr(g, a, space)
    if off:
        t = g.tmp()
        g.emit(f"{t} = {e} + {g.kc.const(k, off)}")
        return t
    return e


def is_strong(ins):
    """Volatile, acquire, release and relaxed accesses synchronise and are not logged."""
    return bool(ins.modset & {"volatile", "acquire", "release", "relaxed", "mmio"})


@op("ld", "ldu")
def _ld(g, i):
    sp = space_of(i)
    t = itype(i)
    n = vec_of(i)
    a = i.ops[1]
    d = i.ops[0]
    w = TYPE_SIZES[t]
    kc = g.kc
    if sp == "param" and isinstance(a.base, Sym) and a.base.name in kc.local_off:
        sp = "local"
    if sp == "local" and isinstance(a.base, Sym) and a.base.name in kc.param_off:
        sp = "param"
    if sp == "param" and isinstance(a.base, Sym):
        off = kc.param_off[a.base.name] + a.off
        items = d.items if isinstance(d, Vec) else (d,)
        for k, x in enumerate(items):
            kind = TYPE_KIND[t]
            uk = kind if kind[0] in "us" else "u" + kind[1:]
            g.dst(i, x, uk, f"W.param({off + k * w}, {uk!r})")
        return
    if sp == "param":
        sp = "generic"
    if w == 16:
        base, off = base_expr(g, a, sp)
        site = Site(kc, i, sp, 8, 2 * n, off)
        f = g.bind("ld", _reader(site, sp))
        r = g.tmp()
        g.emit(f"{r} = {f}(W, {base}, {g.mask(i)})")
        items = d.items if isinstance(d, Vec) else (d,)
        for k, x in enumerate(items):
            g.dst(i, x, "q", f"qpack({r}[{2 * k}], {r}[{2 * k + 1}])")
        return
    base, off = base_expr(g, a, sp)
    site = Site(kc, i, sp, w, n, off)
    f = g.bind("ld", _reader(site, sp))
    r = g.tmp()
    if is_strong(i):
        if sp in ("shared", "generic"):
            g.emit(f"W.strong_acquire({base}, {g.mask(i)}, {off}, {sp!r})")
        g.emit("W.yield_ = True")
    g.emit(f"{r} = {f}(W, {base}, {g.mask(i)})")
    kind = TYPE_KIND[t]
    k = kind if kind[0] == "u" else ("s" if kind[0] == "s" else "u") + kind[1:]
    view = f".view({k.upper()})" if k[0] == "s" else ""
    if n == 1 and not isinstance(d, Vec):
        g.dst(i, d, k, r + view)
    else:
        for x_i, x in enumerate(d.items):
            if isinstance(x, Sym):
                continue
            g.dst(i, x, k, (f"{r}[{x_i}]" if n > 1 else r) + view)


def _reader(site, sp):
    return {
        "global": site.global_ld,
        "const": site.global_ld,
        "shared": site.shared_ld,
        "local": site.local_ld,
        "generic": lambda: site.generic(False),
    }[sp]()


@op("st")
def _st(g, i):
    if "async" in i.modset:
        from .ops_async import st_async

        return st_async(g, i)
    sp = space_of(i)
    t = itype(i)
    n = vec_of(i)
    a, s = i.ops[0], i.ops[1]
    w = TYPE_SIZES[t]
    if sp == "param":
        sp = "local"
    vals = s.items if isinstance(s, Vec) else (s,)
    if w == 16:
        q = [g.src(v, "q") for v in vals]
        base, off = base_expr(g, a, sp)
        site = Site(g.kc, i, sp, 8, 2 * n, off, True)
        f = g.bind("st", _writer(site, sp))
        args = ", ".join(f"{x}[:, {k}]" for x in q for k in (0, 1))
        g.emit(f"{f}(W, {base}, {g.mask(i)}, {args})")
        return
    args = ", ".join(g.src(v, f"u{w}") for v in vals)
    base, off = base_expr(g, a, sp)
    site = Site(g.kc, i, sp, w, n, off, True)
    f = g.bind("st", _writer(site, sp))
    strong = is_strong(i)
    if strong and sp in ("shared", "generic"):
        g.emit(f"W.strong_release({base}, {g.mask(i)}, {off}, {sp!r})")
    g.emit(f"{f}(W, {base}, {g.mask(i)}, {args})")
    if strong:
        g.emit("W.cta.launch.progress += 1")


def _writer(site, sp):
    return {
        "global": site.global_st,
        "shared": site.shared_st,
        "local": site.local_st,
        "const": site.global_st,
        "generic": lambda: site.generic(True),
    }[sp]()


@op("atom", "red")
def _atom(g, i):
    if "async" in i.modset:
        g.unsupported(i)
    sp = space_of(i)
    t = itype(i)
    n = vec_of(i)
    w = TYPE_SIZES[t]
    ret = i.op == "atom"
    d = i.ops[0] if ret else None
    a = i.ops[1] if ret else i.ops[0]
    srcs = i.ops[2:] if ret else i.ops[1:]
    what = next(m for m in i.mods if m in ATOMS)
    base, off = base_expr(g, a, sp)
    fn, uf = ATOMS[what]
    kind = TYPE_KIND[t]
    site = Site(g.kc, i, sp, w, n, off, True)
    site.packed = t in ("f16x2", "bf16x2")
    if t in ("bf16", "bf16x2"):
        fn, uf = BF_ATOMS[what], None
        site.vkind = U2
    elif t == "f16x2" or t == "f16":
        site.vkind, uf = F2, None
    else:
        site.vkind = DT[kind]
    if w == 16:
        g.unsupported(i)
    f = g.bind("at", atomic(site, fn, ret, uf))
    vals = []
    for s in srcs:
        if isinstance(s, Vec):
            vals += [g.src(x, f"u{w}") for x in s.items]
        else:
            vals.append(g.src(s, f"u{w}"))
    r = g.tmp()
    if sp in ("shared", "generic"):
        g.emit(f"W.strong_acquire({base}, {g.mask(i)}, {off}, {sp!r}, True)")
    g.emit(f"{r} = {f}(W, {base}, {g.mask(i)}, {', '.join(vals)})")
    if ret:
        items = d.items if isinstance(d, Vec) else (d,)
        for k, x in enumerate(items):
            if isinstance(x, Sym):
                continue
            g.dst(i, x, f"u{w}", f"{r}[{k}]" if n > 1 else r)


# ---------------------------------------------------------------- hints and fences
@op(
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "griddepcontrol",
    "setmaxnreg",
    "discard",
    "applypriority",
    "pmevent",
    "brkpt",
)
def _nop(g, i):
    if i.op == "fence" and "proxy" in i.modset and "async" in i.name:
        g.emit("W.proxy_fence()")


@op("nanosleep")
def _nanosleep(g, i):
    g.emit("W.yield_ = True")


# ---------------------------------------------------------------- barriers
@op("bar", "barrier")
def _bar(g, i):
    ms = i.modset
    where = g.bind("S", g.kc.where_text(i))
    if "warp" in ms:
        from .ops_compare import member_mask

        member_mask(g, i, i.ops[0])
        return
    nxt = g.block.index + 1
    if "cluster" in ms:
        if "arrive" in ms:
            g.emit(f"W.cluster_arrive({g.mask(i)}, {where})")
            return
        g.finish()
        g.emit(f"return W.cluster_wait(m, {nxt}, {where})")
        return
    if i.pred:
        return _guarded_bar(g, i, nxt, where)
    _bar_body(g, i, nxt, where)


def _guarded_bar(g, i, nxt, where):
    """``@p bar``: lanes with p false skip the barrier."""
    p = g.mask(i)
    args = _bar_args(g, i)
    g.finish()
    g.emit(f"return W.guarded_bar({p}, m, {nxt}, {args}, {where})")


def _bar_args(g, i):
    ms = i.modset
    mode = "arrive" if "arrive" in ms else "red" if "red" in ms else "sync"
    ops = list(i.ops)
    dest = pred = None
    op_ = None
    if mode == "red":
        op_ = next(m for m in i.mods if m in ("popc", "and", "or"))
        dest = g.kc.reg_index[ops[0].name]
        dk = g.kc.kind[ops[0].name]
        pred = ops[-1]
        ops = ops[1:-1]
    ident = g.imm_of(ops[0])
    ident = str(ident) if ident is not None else f"int({g.src(ops[0], 'u4')}[lead(m)])"
    cnt = "0"
    if len(ops) > 1:
        c = g.imm_of(ops[1])
        cnt = str(c) if c is not None else f"int({g.src(ops[1], 'u4')}[lead(m)])"
    from .ops_compare import predicate_source

    if mode == "red":
        t = g.tmp()
        g.emit(f"{t} = {predicate_source(g, pred)}")
        red = f"({op_!r}, {dest}, {t}, {dk!r})"
    else:
        red = "None"
    aligned = i.op == "bar" or "aligned" in ms
    return f"{mode!r}, {ident}, {cnt}, {red}, {aligned}"


def _bar_body(g, i, nxt, where):
    args = _bar_args(g, i)
    g.finish()
    g.emit(f"return W.bar(m, {nxt}, {args}, {where})")


# ---------------------------------------------------------------- calls
@op("call")
def _call(g, i):
    target, _rets, args = i.ops
    name = target.name
    offs = [g.kc.local_off[a.name] for a in args]
    where = g.bind("S", g.kc.where_text(i))
    if name == "vprintf":
        g.emit(f"W.printf({g.mask(i)}, {offs[0]}, {offs[1]})")
    elif name == "__assertfail":
        g.emit(f"W.assertfail({g.mask(i)}, {tuple(offs)}, {where})")
    else:
        g.unsupported(i)


@op("mapa")
def _mapa(g, i):
    d, a, r = i.ops
    rank = g.src(r, "u4")
    if "shared::cluster" in i.modset:
        s = g.src(a, "u4")
        e = f"({s} & U4(0xFFFFFF)) | ({rank} << U4(24))"
        g.dst(i, d, "u4", e)
    else:
        s = g.src(a, "u8")
        g.dst(i, d, "u8", f"({s} & U8(0xFFFFFFFF00FFFFFF)) | ({rank}.astype(U8) << U8(24))")


@op("getctarank")
def _getctarank(g, i):
    a = g.src(
        i.ops[1], "u8" if itype(i) in ("u64", "b64") and "shared::cluster" not in i.modset else "u4"
    )
    g.dst(
        i, i.ops[0], "u4", f"(({a} >> {'U8' if a.endswith('u8') else 'U4'}(24)) & 0xFF).astype(U4)"
    )
