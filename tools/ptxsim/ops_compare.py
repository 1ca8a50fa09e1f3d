"""Emitters for comparison, selection and warp collectives."""

from .emitters import TYPE_KIND, TYPE_SIZES, itype, op
from .helpers import shfl_index
from .ops_float import to_f4
from .syntax import Not, Pair, Reg, Sym

_FLOATS = {"f32", "f64", "f16", "bf16", "f16x2", "bf16x2", "f32x2"}

# ---------------------------------------------------------------- comparison and selection
_CMP = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}


def compare(g, i, cmp, t, a, b):
    """Expression comparing operands a and b of type t."""
    if t in _FLOATS:
        if t in ("f16x2", "bf16x2"):
            x, y = g.src(a, "u4"), g.src(b, "u4")
            if t == "f16x2":
                x, y = f"{x}.view(F2)", f"{y}.view(F2)"
            else:
                x, y = f"bf2f({x}.view(U2))", f"bf2f({y}.view(U2))"
        else:
            x, y = (
                to_f4(g, a, t) if t == "bf16" else g.src(a, TYPE_KIND[t]),
                to_f4(g, b, t) if t == "bf16" else g.src(b, TYPE_KIND[t]),
            )
        if cmp == "num":
            return f"~(np.isnan({x}) | np.isnan({y}))"
        if cmp == "nan":
            return f"(np.isnan({x}) | np.isnan({y}))"
        if cmp == "ne":
            return f"(({x} < {y}) | ({x} > {y}))"
        if cmp == "neu":
            return f"({x} != {y})"
        if cmp == "equ":
            return f"~(({x} < {y}) | ({x} > {y}))"
        if cmp.endswith("u"):
            inv = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}[cmp]
            return f"~({x} {inv} {y})"
        return f"({x} {_CMP[cmp]} {y})"
    k = TYPE_KIND[t]
    if k == "b":
        return f"({g.src(a, 'b')} {_CMP[cmp]} {g.src(b, 'b')})"
    return f"({g.src(a, k)} {_CMP[cmp]} {g.src(b, k)})"


def predicate_source(g, o):
    if isinstance(o, Not):
        return f"(~{g.src(o.reg, 'b')})"
    return g.src(o, "b")


@op("setp")
def _setp(g, i):
    t = itype(i)
    cmp = i.mods[0]
    boolop = next((m for m in i.mods if m in ("and", "or", "xor")), None)
    d, a, b = i.ops[0], i.ops[1], i.ops[2]
    e = compare(g, i, cmp, t, a, b)
    if t in ("f16x2", "bf16x2"):
        v = g.tmp()
        g.emit(f"{v} = {e}")
        if boolop:
            c = predicate_source(g, i.ops[3])
            g.unsupported(i) if boolop not in ("and", "or", "xor") else None
            s = {"and": "&", "or": "|", "xor": "^"}[boolop]
            g.dst(i, d.a, "b", f"ascont({v}[0::2]) {s} {c}")
            g.dst(i, d.b, "b", f"ascont({v}[1::2]) {s} {c}")
            return
        g.dst(i, d.a, "b", f"ascont({v}[0::2])")
        g.dst(i, d.b, "b", f"ascont({v}[1::2])")
        return
    s = {"and": "&", "or": "|", "xor": "^", None: None}[boolop]
    if isinstance(d, Pair):
        v = g.tmp()
        g.emit(f"{v} = {e}")
        if s:
            c = g.tmp()
            g.emit(f"{c} = {predicate_source(g, i.ops[3])}")
            g.dst(i, d.a, "b", f"{v} {s} {c}")
            g.dst(i, d.b, "b", f"~{v} {s} {c}")
        else:
            g.dst(i, d.a, "b", v)
            g.dst(i, d.b, "b", f"~{v}")
        return
    if s:
        e = f"{e} {s} {predicate_source(g, i.ops[3])}"
    g.dst(i, d, "b", e)


@op("set")
def _set(g, i):
    ts = [m for m in i.mods if m in TYPE_SIZES]
    dt, st = ts[0], ts[1]
    e = compare(g, i, i.mods[0], st, i.ops[1], i.ops[2])
    boolop = next((m for m in i.mods if m in ("and", "or", "xor")), None)
    if boolop:
        sign = {"and": "&", "or": "|", "xor": "^"}[boolop]
        e = f"({e} {sign} {predicate_source(g, i.ops[3])})"
    if dt == "f32":
        g.dst(i, i.ops[0], "f4", f"({e}).astype(F4)")
    elif dt == "f16":
        g.dst(i, i.ops[0], "f2", f"({e}).astype(F2)")
    elif dt in ("f16x2", "bf16x2"):
        one = "0x3C00" if dt == "f16x2" else "0x3F80"
        g.dst(i, i.ops[0], "u4", f"(({e}).astype(U2) * U2({one})).view(U4)")
    elif dt == "bf16":
        g.dst(i, i.ops[0], "u2", f"({e}).astype(U2) * U2(0x3F80)")
    elif st in ("f16x2", "bf16x2"):
        g.dst(i, i.ops[0], "u4", f"(({e}).astype(U2) * U2(0xFFFF)).view(U4)")
    else:
        k = "u" + TYPE_KIND[dt][1:]
        g.dst(i, i.ops[0], k, f"-(({e}).astype({k.upper()}))")


@op("selp")
def _selp(g, i):
    t = itype(i)
    k = TYPE_KIND[t]
    if t == "pred":
        k = "b"
    a, b = g.src(i.ops[1], k), g.src(i.ops[2], k)
    g.dst(i, i.ops[0], k, f"where({predicate_source(g, i.ops[3])}, {a}, {b})")


@op("slct")
def _slct(g, i):
    ts = [m for m in i.mods if m in TYPE_SIZES]
    k, ck = TYPE_KIND[ts[0]], TYPE_KIND[ts[1]]
    a, b, c = g.src(i.ops[1], k), g.src(i.ops[2], k), g.src(i.ops[3], ck)
    g.dst(i, i.ops[0], k, f"where({c} >= 0, {a}, {b})")


# ---------------------------------------------------------------- warp collectives
def member_mask(g, i, o):
    """Emit the check that the lanes named by a member mask are the active ones."""
    c = g.imm_of(o)
    s = g.bind("S", g.kc.where_text(i))
    if c is not None:
        g.emit(f"if m is not None: W.members({c & 0xFFFFFFFF}, m, {s})")
    else:
        g.emit(f"if m is not None: W.members(int({g.src(o, 'u4')}[m.argmax()]), m, {s})")


@op("shfl")
def _shfl(g, i):
    d, a, b, c = i.ops[:4]
    if len(i.ops) > 4:
        member_mask(g, i, i.ops[4])
    mode = next(m for m in i.mods if m in ("up", "down", "bfly", "idx"))
    dd, dp = (d.a, d.b) if isinstance(d, Pair) else (d, None)
    cb, cc = g.imm_of(b), g.imm_of(c)
    v = g.src(a, "u4")
    if isinstance(a, Reg) and g.kc.kind.get(a.name) == "f4":
        v = g.src(a, "f4")
    k = "f4" if v.endswith("_f4") else "u4"
    if cb is not None and cc is not None:
        idx, p = shfl_index(cb, cc, mode)
        n = g.bind("X", idx)
        g.dst(i, dd, k, f"{v}.take({n})")
        if dp is not None and not (isinstance(dp, Sym)):
            g.dst(i, dp, "b", g.bind("X", p))
        return
    x, p = g.tmp(), g.tmp()
    g.emit(f"{x}, {p} = shfl({v}, {g.src(b, 'u4')}, {g.src(c, 'u4')}, {mode!r}, m)")
    g.dst(i, dd, k, x)
    if dp is not None and not isinstance(dp, Sym):
        g.dst(i, dp, "b", p)


@op("vote")
def _vote(g, i):
    p = predicate_source(g, i.ops[1])
    if len(i.ops) > 2:
        member_mask(g, i, i.ops[2])
    if "ballot" in i.modset:
        g.dst(i, i.ops[0], "u4", f"full4(ballot({p}, {g.mask(i)}))")
    else:
        mode = next(m for m in i.mods if m in ("all", "any", "uni"))
        g.dst(i, i.ops[0], "b", f"vote({p}, {g.mask(i)}, {mode!r})")


@op("activemask")
def _activemask(g, i):
    g.dst(i, i.ops[0], "u4", f"full4(mask_int({g.mask(i)}))")


@op("match")
def _match(g, i):
    k = TYPE_KIND[itype(i)]
    member_mask(g, i, i.ops[2])
    v = g.src(i.ops[1], k)
    if "any" in i.modset:
        g.dst(i, i.ops[0], "u4", f"match_any({v}, m)")
        return
    d = i.ops[0]
    x, p = g.tmp(), g.tmp()
    g.emit(f"{x}, {p} = match_all({v}, m)")
    if isinstance(d, Pair):
        g.dst(i, d.a, "u4", x)
        g.dst(i, d.b, "b", p)
    else:
        g.dst(i, d, "u4", x)


@op("redux")
def _redux(g, i):
    k = TYPE_KIND[itype(i)]
    member_mask(g, i, i.ops[2])
    what = next(m for m in i.mods if m in ("add", "min", "max", "and", "or", "xor"))
    g.dst(i, i.ops[0], k, f"redux({g.src(i.ops[1], k)}, m, {what!r}, {g.src(i.ops[2], 'u4')})")


@op("elect")
def _elect(g, i):
    d = i.ops[0]
    member_mask(g, i, i.ops[1])
    t = g.tmp()
    g.emit(f"{t} = lead(m)")
    if isinstance(d, Pair):
        if not (isinstance(d.a, Sym)):
            g.dst(i, d.a, "u4", f"full4({t})")
        g.dst(i, d.b, "b", f"LANES == U4({t})")
    else:
        g.dst(i, d, "b", f"LANES == U4({t})")
