"""Emitters for moves, integer arithmetic and logic."""

from .emitters import TYPE_KIND, TYPE_SIZES, itype, op
from .ops_float import float_arithmetic
from .syntax import Imm, Pair, Reg, Sym, Vec

_FLOATS = {"f32", "f64", "f16", "bf16", "f16x2", "bf16x2", "f32x2"}


# ---------------------------------------------------------------- moves
@op("mov")
def _mov(g, i):
    d, s = i.ops
    t = itype(i)
    kc = g.kc
    if isinstance(d, Vec):  # unpack
        n = len(d.items)
        if t == "b128":
            v = g.src(s, "q")
            for k, x in enumerate(d.items):
                g.dst(i, x, "u8", f"ascont({v}[:, {k}])")
            return
        w = TYPE_SIZES[t] // n
        if isinstance(s, Reg) and s.name in kc.wgregs:
            g.flush_regs(list(kc.wgregs))
            where = g.bind("S", kc.where_text(i))
            g.emit(f"if {kc.reg_index[s.name]} in W.inflight: W.wg_force({where})")
            g.drop(kc.wgregs)
        v = g.src(s, f"u{TYPE_SIZES[t]}")
        for k, x in enumerate(d.items):
            if isinstance(x, Sym):
                continue
            big = TYPE_SIZES[t]
            e = v if k == 0 else f"({v} >> {kc.const(f'u{big}', 8 * w * k)})"
            g.dst(i, x, f"u{w}", f"{e}.astype(U{w})")
        return
    if isinstance(s, Vec):  # pack
        n = len(s.items)
        if t == "b128":
            lo, hi = (g.src(x, "u8") for x in s.items)
            g.dst(i, d, "q", f"qpack({lo}, {hi})")
            return
        big = TYPE_SIZES[t]
        w = big // n
        parts = []
        for k, x in enumerate(s.items):
            if isinstance(x, Imm):
                bits = g.imm_bits(x, f"u{w}") << (8 * w * k)
                parts.append(kc.const(f"u{big}", bits))
                continue
            e = g.src(x, f"u{w}")
            e = f"{e}.astype(U{big})"
            if k:
                e = f"({e} << {kc.const(f'u{big}', 8 * w * k)})"
            parts.append(e)
        g.dst(i, d, f"u{big}", " | ".join(parts))
        return
    if t == "pred":
        g.dst(i, d, "b", g.src(s, "b"))
        return
    if isinstance(s, Reg) and isinstance(d, Reg) and s.name in kc.wgregs:
        di, si = kc.reg_index[d.name], kc.reg_index[s.name]
        g.flush_regs([s.name])
        if g.kc.kind[d.name] != g.kc.kind[s.name]:
            conv = f"R[{si}].view({g.kc.kind[d.name].upper()})"
        else:
            conv = f"R[{si}]"
        if i.pred:
            g.unsupported(i, "predicated move of a wgmma accumulator")
        g.emit(f"if {si} in W.inflight: W.wg_alias({di}, {si})")
        g.emit(f"else: R[{di}] = {conv} if m is None else where(m, {conv}, R[{di}])")
        g.drop([d.name])
        g.dirty.pop(d.name, None)
        return
    if (
        isinstance(s, Reg)
        and isinstance(d, Reg)
        and not i.pred
        and s.name not in kc.const_regs
        and d.name not in kc.const_regs
        and g.width(s.name) == g.width(d.name)
        and kc.fn.regs[s.name] != "pred"
        and kc.fn.regs[d.name] != "pred"
    ):
        h = g.base(s.name)
        k0, v0 = next(iter(h.items()))
        var = f"r{kc.reg_index[d.name]}_{k0}"
        g.emit(f"{var} = {v0}")
        g.set_local(d.name, {k0: var})
        return
    k = TYPE_KIND[t]
    g.dst(i, d, k, g.src(s, k))


@op("cvta")
def _cvta(g, i):
    d, s = i.ops
    k = TYPE_KIND[itype(i)]
    sp = next(
        (
            x
            for x in ("shared", "local", "param", "const", "global")
            if any(m.split("::")[0] == x for m in i.mods)
        ),
        None,
    )
    v = g.src(s, k)
    if sp in ("global", "const", None):
        g.dst(i, d, k, v)
        return
    win = {"shared": 1, "local": 2, "param": 3}[sp] << 48
    if k == "u4":
        g.dst(i, d, k, v)
    elif sp == "param" and "to" not in i.modset:
        g.dst(i, d, k, v)  # parameter symbols are already generic
    elif "to" in i.modset:
        if sp == "param":
            g.dst(i, d, k, v)
        else:
            g.dst(i, d, k, f"{v} - {g.kc.const(k, win)}")
    else:
        g.dst(i, d, k, f"{v} + {g.kc.const(k, win)}")


@op("isspacep")
def _isspacep(g, i):
    sp = next(
        m.split("::")[0]
        for m in i.mods
        if m.split("::")[0] in ("global", "shared", "local", "const", "param")
    )
    code = {"global": 0, "const": 0, "shared": 1, "local": 2, "param": 3}[sp]
    a = g.src(i.ops[1], "u8")
    g.dst(i, i.ops[0], "b", f"({a} >> {g.kc.const('u8', 48)}) == {g.kc.const('u8', code)}")


@op("createpolicy")
def _createpolicy(g, i):
    g.dst(i, i.ops[0], "u8", g.kc.const("u8", 0x1234))


# ---------------------------------------------------------------- integer arithmetic
def _fl(t):
    return t in _FLOATS


@op("add", "sub")
def _addsub(g, i):
    t = itype(i)
    if _fl(t):
        return float_arithmetic(g, i, t)
    sym = "+" if i.op == "add" else "-"
    if "cc" in i.modset:
        return _addcc(g, i)
    if "sat" in i.modset and t == "s32":
        a, b = g.src(i.ops[1], "s4"), g.src(i.ops[2], "s4")
        g.dst(i, i.ops[0], "s4", f"isat({a}.astype(S8) {sym} {b}.astype(S8), S4)")
        return
    if t in ("u16x2", "s16x2"):
        g.unsupported(i)
    k = TYPE_KIND[t]
    k = "u" + k[1:]
    a, b = g.src(i.ops[1], k), g.src(i.ops[2], k)
    g.dst(i, i.ops[0], k, f"{a} {sym} {b}")


@op("addc", "subc")
def _addcc(g, i):
    t = itype(i)
    k = "u" + TYPE_KIND[t][1:]
    a, b = g.src(i.ops[1], k), g.src(i.ops[2], k)
    w = k[1:]
    carry = "0"
    if i.op.endswith("c"):
        cin = g.tmp()
        g.emit(f"{cin} = W.cc.astype(U{w})")
        carry = cin
    r, c = g.tmp(), g.tmp()
    if i.op.startswith("add"):
        g.emit(f"{r} = {a} + {b}")
        g.emit(f"{c} = {r} < {a}")
        if carry != "0":
            g.emit(f"{c} = {c} | (({r} + {carry}) < {r})")
            g.emit(f"{r} = {r} + {carry}")
    else:
        g.emit(f"{r} = {a} - {b}")
        g.emit(f"{c} = {a} < {b}")
        if carry != "0":
            g.emit(f"{c} = {c} | ({r} < {carry})")
            g.emit(f"{r} = {r} - {carry}")
    if "cc" in i.modset:
        g.emit(f"W.cc = {c}")
    g.dst(i, i.ops[0], k, r)


@op("mul", "mad", "mul24", "mad24")
def _mul(g, i):
    t = itype(i)
    if _fl(t):
        return float_arithmetic(g, i, t)
    k = TYPE_KIND[t]
    w = int(k[1:])
    a, b = g.src(i.ops[1], k), g.src(i.ops[2], k)
    mad = i.op.startswith("mad")
    if "24" in i.op:
        if k[0] == "s":
            sh = g.kc.const("s4", 8)
            a, b = f"(({a} << {sh}) >> {sh})", f"(({b} << {sh}) >> {sh})"
        else:
            mk = g.kc.const("u4", 0xFFFFFF)
            a, b = f"({a} & {mk})", f"({b} & {mk})"
        if "hi" in i.modset:
            k8 = k[0].upper() + "8"
            e = (
                f"((({a}).astype({k8}) * ({b}).astype({k8})) >> {g.kc.const(k[0] + '8', 16)})"
                f".astype({k.upper()})"
            )
        else:
            e = f"({a} * {b})"
        rk = k
    elif "wide" in i.modset:
        rk = f"{k[0]}{w * 2}"
        e = f"({a}.astype({rk.upper()}) * {b}.astype({rk.upper()}))"
    elif "hi" in i.modset:
        rk = k
        if w == 8:
            e = f"mulhi_{k}({a}, {b})"
        else:
            k2 = f"{k[0]}{w * 2}"
            e = (
                f"(({a}.astype({k2.upper()}) * {b}.astype({k2.upper()})) >> "
                f"{g.kc.const(k2, 8 * w)}).astype({k.upper()})"
            )
    else:
        rk = k
        e = f"{a} * {b}"
    if mad:
        c = g.src(i.ops[3], rk)
        if "cc" in i.modset or i.op == "madc":
            u = "u" + rk[1:]
            r = g.tmp()
            g.emit(f"{r} = ({e}).view({u.upper()})")
            c = g.src(i.ops[3], u)
            s = g.tmp()
            g.emit(f"{s} = {r} + {c}")
            g.emit(f"W.cc = {s} < {r}")
            g.dst(i, i.ops[0], u, s)
            return
        if "sat" in i.modset:
            g.unsupported(i)
        e = f"{e} + {c}"
    g.dst(i, i.ops[0], rk, e)


@op("madc")
def _madc(g, i):
    t = itype(i)
    k = TYPE_KIND[t]
    w = int(k[1:])
    a, b = g.src(i.ops[1], k), g.src(i.ops[2], k)
    if "hi" in i.modset:
        k2 = f"{k[0]}{w * 2}"
        e = (
            f"mulhi_{k}({a}, {b})"
            if w == 8
            else f"(({a}.astype({k2.upper()}) * {b}.astype({k2.upper()})) >> "
            f"{g.kc.const(k2, 8 * w)}).astype({k.upper()})"
        )
    else:
        e = f"{a} * {b}"
    u = "u" + k[1:]
    c = g.src(i.ops[3], u)
    r, s, ci = g.tmp(), g.tmp(), g.tmp()
    g.emit(f"{r} = ({e}).view({u.upper()})")
    g.emit(f"{ci} = W.cc.astype({u.upper()})")
    g.emit(f"{s} = {r} + {c}")
    g.emit(f"t = ({s} < {r}) | (({s} + {ci}) < {s})")
    if "cc" in i.modset:
        g.emit("W.cc = t")
    g.dst(i, i.ops[0], u, f"{s} + {ci}")


@op("div", "rem")
def _div(g, i):
    t = itype(i)
    if _fl(t):
        return float_arithmetic(g, i, t)
    k = TYPE_KIND[t]
    a, b = g.src(i.ops[1], k), g.src(i.ops[2], k)
    f = (
        {"div": "idiv", "rem": "irem"}[i.op]
        if k[0] == "s"
        else {"div": "udiv", "rem": "urem"}[i.op]
    )
    g.dst(i, i.ops[0], k, f"{f}({a}, {b})")


@op("min", "max")
def _minmax(g, i):
    t = itype(i)
    if _fl(t):
        return float_arithmetic(g, i, t)
    k = TYPE_KIND[t]
    a, b = g.src(i.ops[1], k), g.src(i.ops[2], k)
    f = "np.minimum" if i.op == "min" else "np.maximum"
    e = f"{f}({a}, {b})"
    if "relu" in i.modset:
        e = f"np.maximum({e}, 0)"
    g.dst(i, i.ops[0], k, e)


@op("abs", "neg")
def _absneg(g, i):
    t = itype(i)
    if _fl(t):
        return float_arithmetic(g, i, t)
    k = "s" + TYPE_KIND[t][1:]
    a = g.src(i.ops[1], k)
    g.dst(i, i.ops[0], k, f"np.abs({a})" if i.op == "abs" else f"-{a}")


@op("and", "or", "xor", "not", "cnot")
def _logic(g, i):
    k = TYPE_KIND[itype(i)]
    a = g.src(i.ops[1], k)
    if i.op == "not":
        g.dst(i, i.ops[0], k, f"~{a}")
    elif i.op == "cnot":
        g.dst(i, i.ops[0], k, f"({a} == 0).astype({k.upper()})")
    else:
        b = g.src(i.ops[2], k)
        g.dst(i, i.ops[0], k, f"{a} {dict(zip(('and', 'or', 'xor'), '&|^'))[i.op]} {b}")


@op("shl", "shr")
def _shift(g, i):
    k = TYPE_KIND[itype(i)]
    a = g.src(i.ops[1], k)
    c = g.imm_of(i.ops[2])
    w = int(k[1:])
    if c is not None:
        c &= 0xFFFFFFFF
        b = g.kc.const(k, min(c, 8 * w if k[0] == "u" else 8 * w - 1))
        if c >= 8 * w and (i.op == "shl" or k[0] == "u"):
            g.dst(i, i.ops[0], k, g.kc.const(k, 0))
            return
    else:
        b = g.src(i.ops[2], "u4")
        if w == 2:
            b = f"np.minimum({b}, {g.kc.const('u4', 16)}).astype({k.upper()})"
        elif w == 8:
            b = f"{b}.astype({k.upper()})"
        elif k[0] == "s":
            b = f"{b}.view(S4)"
    g.dst(i, i.ops[0], k, f"{a} {'<<' if i.op == 'shl' else '>>'} {b}")


@op("shf")
def _shf(g, i):
    a, b, n = (g.src(x, "u4") for x in i.ops[1:4])
    g.dst(i, i.ops[0], "u4", f"shf({a}, {b}, {n}, {'l' in i.modset}, {'wrap' in i.modset})")


@op("lop3")
def _lop3(g, i):
    d = i.ops[0]
    ops = i.ops[1:]
    a, b, c = (g.src(x, "u4") for x in ops[:3])
    lut = g.imm_of(ops[3]) & 0xFF
    known = {
        0x80: "{a} & {b} & {c}",
        0xFE: "{a} | {b} | {c}",
        0x96: "{a} ^ {b} ^ {c}",
        0xEA: "({a} & {b}) | {c}",
        0xF8: "{a} | ({b} & {c})",
        0xC0: "{a} & {b}",
        0xFC: "{a} | {b}",
        0x3C: "{a} ^ {b}",
        0xCA: "({a} & {b}) | (~{a} & {c})",
        0x6A: "({a} & {b}) ^ {c}",
        0x78: "{a} ^ ({b} & {c})",
        0xA8: "({a} | {b}) & {c}",
    }
    if lut in known:
        e = known[lut].format(a=a, b=b, c=c)
    elif lut == 0:
        e = g.kc.const("u4", 0)
    elif lut == 255:
        e = g.kc.const("u4", 0xFFFFFFFF)
    else:
        terms = [
            f"({'' if t & 4 else '~'}{a} & {'' if t & 2 else '~'}{b} & {'' if t & 1 else '~'}{c})"
            for t in range(8)
            if lut >> t & 1
        ]
        e = " | ".join(terms)
    if isinstance(d, Pair):
        g.unsupported(i, "lop3 with predicate")
    g.dst(i, d, "u4", e)


@op("prmt")
def _prmt(g, i):
    a, b = g.src(i.ops[1], "u4"), g.src(i.ops[2], "u4")
    mode = next((m for m in i.mods if m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")), "")
    c = g.imm_of(i.ops[3])
    if c is not None and not mode:
        sel = [(c >> (4 * n)) & 15 for n in range(4)]
        if not any(s & 8 for s in sel):
            K = g.kc.const
            if sel == [0, 1, 4, 5]:
                e = f"({a} & {K('u4', 0xFFFF)}) | ({b} << {K('u4', 16)})"
            elif sel == [2, 3, 6, 7]:
                e = f"({a} >> {K('u4', 16)}) | ({b} & {K('u4', 0xFFFF0000)})"
            else:
                ts = []
                for n, s in enumerate(sel):
                    x, sh = (a, s) if s < 4 else (b, s - 4)
                    ts.append(
                        f"((({x} >> {K('u4', 8 * sh)}) & {K('u4', 255)}) << {K('u4', 8 * n)})"
                    )
                e = " | ".join(ts)
            g.dst(i, i.ops[0], "u4", e)
            return
    g.dst(i, i.ops[0], "u4", f"prmt({a}, {b}, {g.src(i.ops[3], 'u4')}, {mode!r})")


@op("bfe")
def _bfe(g, i):
    t = itype(i)
    k = "u" + TYPE_KIND[t][1:]
    a, p, n = g.src(i.ops[1], k), g.src(i.ops[2], "u4"), g.src(i.ops[3], "u4")
    cp, cn = g.imm_of(i.ops[2]), g.imm_of(i.ops[3])
    w = int(k[1:]) * 8
    if t[0] == "u" and cp is not None and cn is not None and cp + cn <= w:
        e = f"({a} >> {g.kc.const(k, cp)}) & {g.kc.const(k, (1 << cn) - 1)}"
    else:
        e = f"bfe({a}, {p}, {n}, {t[0] == 's'})"
    g.dst(i, i.ops[0], k, e)


@op("bfi")
def _bfi(g, i):
    k = TYPE_KIND[itype(i)]
    a, b = g.src(i.ops[1], k), g.src(i.ops[2], k)
    p, n = g.src(i.ops[3], "u4"), g.src(i.ops[4], "u4")
    g.dst(i, i.ops[0], k, f"bfi({a}, {b}, {p}, {n})")


@op("bfind")
def _bfind(g, i):
    k = TYPE_KIND[itype(i)]
    g.dst(
        i, i.ops[0], "u4", f"bfind({g.src(i.ops[1], k)}, {k[0] == 's'}, {'shiftamt' in i.modset})"
    )


@op("clz", "brev", "popc")
def _bits(g, i):
    k = TYPE_KIND[itype(i)]
    a = g.src(i.ops[1], k)
    if i.op == "brev":
        g.dst(i, i.ops[0], k, f"brev({a})")
    elif i.op == "clz":
        g.dst(i, i.ops[0], "u4", f"clz({a})")
    else:
        g.dst(i, i.ops[0], "u4", f"np.bitwise_count({a}).astype(U4)")


@op("fns")
def _fns(g, i):
    a, b, c = (g.src(x, "u4") for x in i.ops[1:4])
    g.dst(i, i.ops[0], "u4", f"fns({a}, {b}, {c})")


@op("sad")
def _sad(g, i):
    k = TYPE_KIND[itype(i)]
    a, b, c = (g.src(x, k) for x in i.ops[1:4])
    g.dst(i, i.ops[0], k, f"{c} + (np.maximum({a}, {b}) - np.minimum({a}, {b}))")


@op("dp4a", "dp2a")
def _dp(g, i):
    ty = [m for m in i.mods if m in ("u32", "s32")]
    a, b, _c = (g.src(x, "u4") for x in i.ops[1:4])
    sa, sb = ty[0] == "s32", ty[1] == "s32"
    cc = g.src(i.ops[3], "s4" if sa or sb else "u4")
    if i.op == "dp4a":
        g.dst(i, i.ops[0], "u4", f"dp4a({a}, {b}, {cc}, {sa}, {sb})")
    else:
        g.dst(i, i.ops[0], "u4", f"dp2a({a}, {b}, {cc}, {sa}, {sb}, {int('hi' in i.modset)})")


@op("szext", "bmsk")
def _szext(g, i):
    g.unsupported(i)
