"""Emitters for floating-point arithmetic and conversions."""

from .emitters import TYPE_KIND, TYPE_SIZES, itype, op

_FLOATS = {"f32", "f64", "f16", "bf16", "f16x2", "bf16x2", "f32x2"}


# ---------------------------------------------------------------- floating point
def float_arithmetic(g, i, t):
    o, ms = i.op, i.modset
    if t in ("bf16", "bf16x2"):
        return _bfarith(g, i, t)
    packed = t in ("f16x2", "f32x2")
    k = {"f32": "f4", "f64": "f8", "f16": "f2", "f16x2": "u4", "f32x2": "u8"}[t]
    view = {"f16x2": ".view(F2)", "f32x2": ".view(F4)"}.get(t, "")
    rk = k
    args = [f"{g.src(x, k)}{view}" for x in i.ops[1:]]
    fk = {"f32": "4", "f32x2": "4", "f64": "8", "f16": "2", "f16x2": "2"}[t]
    rm = next((m for m in i.mods if m in ("rz", "rm", "rp")), None)
    if o in ("add", "sub", "mul"):
        sym = {"add": "+", "sub": "-", "mul": "*"}[o]
        if rm and fk == "4":
            e = f"round_mode({args[0]}.astype(F8) {sym} {args[1]}.astype(F8), {rm!r})"
        else:
            e = f"({args[0]} {sym} {args[1]})"
    elif o in ("fma", "mad"):
        if rm and fk == "4":
            e = f"round_mode({args[0]}.astype(F8) * {args[1]} + {args[2]}, {rm!r})"
        else:
            e = f"fma{fk}({args[0]}, {args[1]}, {args[2]})"
    elif o == "div":
        if rm and fk == "4":
            e = f"round_mode({args[0]}.astype(F8) / {args[1]}.astype(F8), {rm!r})"
        else:
            e = f"({args[0]} / {args[1]})"
    elif o in ("min", "max"):
        if len(args) == 3:
            args = [
                f"f{o}({args[0]}, {args[1]})"
                if "NaN" not in ms
                else f"np.{o}imum({args[0]}, {args[1]})",
                args[2],
            ]
        if "abs" in ms:
            args = [f"np.abs({a})" for a in args]
        e = f"np.{o}imum({args[0]}, {args[1]})" if "NaN" in ms else f"np.f{o}({args[0]}, {args[1]})"
        if "xorsign" in ms:
            e = f"xorsign({args[0]}, {args[1]}, f{o}(np.abs({args[0]}), np.abs({args[1]})))"
    elif o == "abs":
        e = f"np.abs({args[0]})"
    elif o == "neg":
        e = f"(-{args[0]})"
    elif o == "rcp":
        e = f"rcp({args[0]})" if fk == "4" and not rm else f"(1.0 / {args[0]})"
        if rm and fk == "4":
            e = f"round_mode(1.0 / {args[0]}.astype(F8), {rm!r})"
    elif o == "sqrt":
        e = f"np.sqrt({args[0]})"
        if rm and fk == "4":
            e = f"round_mode(np.sqrt({args[0]}.astype(F8)), {rm!r})"
    elif o == "rsqrt":
        e = f"rsqrt({args[0]})" if fk == "4" else f"(1.0 / np.sqrt({args[0]}))"
    elif o == "ex2":
        e = f"ex2_ftz({args[0]})" if "ftz" in ms and fk == "4" else f"np.exp2({args[0]})"
    elif o == "lg2":
        e = f"np.log2({args[0]})"
    elif o in ("sin", "cos"):
        e = f"{o}4({args[0]})"
    elif o == "tanh":
        e = f"tanh4({args[0]})" if fk == "4" else f"np.tanh({args[0]}.astype(F4)).astype(F2)"
    else:
        g.unsupported(i)
    if "sat" in ms:
        e = f"sat({e})"
    if "relu" in ms:
        e = f"np.maximum({e}, 0)"
    if packed:
        e = f"({e}).view(U{k[1:]})"
    g.dst(i, i.ops[0], rk, e)


def _bfarith(g, i, t):
    o, ms = i.op, i.modset
    packed = t == "bf16x2"
    k = "u4" if packed else "u2"
    view = ".view(U2)" if packed else ""
    args = [f"{g.src(x, k)}{view}" for x in i.ops[1:]]
    f = [f"bf2f({a})" for a in args]
    if o in ("add", "sub", "mul"):
        e = f"f2bf({f[0]} {dict(add='+', sub='-', mul='*')[o]} {f[1]})"
    elif o == "fma":
        e = f"fmabf({args[0]}, {args[1]}, {args[2]})"
        if "relu" in ms:
            e = f"f2bf(np.maximum(bf2f({e}), 0))"
    elif o in ("min", "max"):
        fn = f"np.{o}imum" if "NaN" in ms else f"f{o}"
        e = f"f2bf({fn}({f[0]}, {f[1]}))"
    elif o == "abs":
        e = f"({args[0]} & U2(0x7FFF))"
    elif o == "neg":
        e = f"({args[0]} ^ U2(0x8000))"
    elif o == "ex2":
        e = f"f2bf(np.exp2({f[0]}))"
    elif o == "tanh":
        e = f"f2bf(np.tanh({f[0]}))"
    else:
        g.unsupported(i)
    if packed:
        e = f"({e}).view(U4)"
    g.dst(i, i.ops[0], k, e)


@op("fma", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _float_only(g, i):
    float_arithmetic(g, i, itype(i))


@op("copysign")
def _copysign(g, i):
    k = TYPE_KIND[itype(i)]
    a, b = g.src(i.ops[1], k), g.src(i.ops[2], k)
    g.dst(i, i.ops[0], k, f"np.copysign({b}, {a})")


@op("testp")
def _testp(g, i):
    k = TYPE_KIND[itype(i)]
    g.dst(i, i.ops[0], "b", f"testp({g.src(i.ops[1], k)}, {i.mods[0]!r})")


# ---------------------------------------------------------------- conversions
_ROUND_I = ("rni", "rzi", "rmi", "rpi")


def to_f4(g, o, t):
    """Expression for an operand of float type ``t`` as f32 (f64 for f64)."""
    if t == "bf16":
        return f"bf2f({g.src(o, 'u2')})"
    if t == "f16":
        return f"{g.src(o, 'f2')}.astype(F4)"
    if t == "f64":
        return g.src(o, "f8")
    return g.src(o, "f4")


@op("cvt")
def _cvt(g, i):
    ts = [
        m
        for m in i.mods
        if m in TYPE_SIZES
        or m in ("e4m3x2", "e5m2x2", "tf32", "ue8m0x2", "e2m1x2", "e2m3x2", "e3m2x2")
    ]
    if "pack" in i.modset:
        return _cvt_pack(g, i)
    dt, st = ts[0], ts[1]
    d, s = i.ops[0], i.ops[1]
    ms = i.modset
    mode = next((m for m in i.mods if m in ("rn", "rz", "rm", "rp", "rna", "rs")), None)
    ri = next((m for m in i.mods if m in _ROUND_I), None)
    relu, sat_ = "relu" in ms, "sat" in ms
    # packed destinations
    if dt in ("f16x2", "bf16x2") and st == "f32":
        hi, lo = g.src(i.ops[1], "f4"), g.src(i.ops[2], "f4")
        if relu:
            hi, lo = f"np.maximum({hi}, F4(0))", f"np.maximum({lo}, F4(0))"
        if dt == "f16x2":
            e = (
                f"pack2({lo}.astype(F2).view(U2), {hi}.astype(F2).view(U2))"
                if mode != "rz"
                else f"pack2(f2h_rz({lo}), f2h_rz({hi}))"
            )
        else:
            e = f"f2bf2({lo}, {hi}, {mode!r})"
        g.dst(i, d, "u4", e)
        return
    if dt in ("e4m3x2", "e5m2x2"):
        f = dt[:4]
        if st == "f32":
            hi, lo = g.src(i.ops[1], "f4"), g.src(i.ops[2], "f4")
        else:
            v = g.src(s, "u4")
            t = g.tmp()
            g.emit(
                f"{t} = {v}.view(F2).astype(F4)" if st == "f16x2" else f"{t} = bf2f({v}.view(U2))"
            )
            lo, hi = f"{t}[0::2]", f"{t}[1::2]"
        g.dst(
            i,
            d,
            "u2",
            f"f2fp8({lo}, {f!r}, {relu}).astype(U2) | "
            f"(f2fp8({hi}, {f!r}, {relu}).astype(U2) << U2(8))",
        )
        return
    if st in ("e4m3x2", "e5m2x2"):
        v = g.src(s, "u2")
        t = g.tmp()
        g.emit(f"{t} = FP8[{st[:4]!r}][ascont({v}).view(U1)]")
        if relu:
            g.emit(f"{t} = np.maximum({t}, F4(0))")
        g.dst(i, d, "u4", f"{t}.astype(F2).view(U4)" if dt == "f16x2" else f"f2bf({t}).view(U4)")
        return
    if dt == "tf32":
        v = g.src(s, "f4")
        if relu:
            v = f"np.maximum({v}, F4(0))"
        g.dst(i, d, "u4", f"to_tf32({v}, {mode or 'rna'!r})")
        return
    fs, fd = st in _FLOATS, dt in _FLOATS
    if not fs and not fd:  # int -> int
        sk, dk = TYPE_KIND[st], TYPE_KIND[dt]
        v = g.src(s, sk)
        if sat_:
            e = f"isat({v}, {dk.upper()})"
        else:
            e = f"{v}.astype({dk.upper()})" if sk != dk else v
        g.dst(i, d, dk, e)
        return
    if not fs and fd:  # int -> float
        v = g.src(s, TYPE_KIND[st])
        if dt == "bf16":
            e = f"f2bf({v}.astype(F8))" if mode != "rz" else f"f2bf({v}.astype(F4), 'rz')"
            g.dst(i, d, "u2", e)
            return
        k = TYPE_KIND[dt]
        if mode in ("rz", "rm", "rp") and k == "f4" and TYPE_SIZES[st] == 4:
            e = f"round_mode({v}.astype(F8), {mode!r})"
        elif k == "f2":
            e = f"{v}.astype(F8).astype(F2)"
        else:
            e = f"{v}.astype({k.upper()})"
        g.dst(i, d, k, e)
        return
    v = to_f4(g, s, st)
    if fs and not fd:  # float -> int
        k = TYPE_KIND[dt]
        g.dst(i, d, k, f"f2i({v}, {k.upper()}, {ri or 'rzi'!r})")
        return
    # float -> float
    e = v
    if ri:
        e = f"frint({e}, {ri!r})"
    if sat_:
        e = f"sat({e})"
    if relu:
        e = f"np.maximum({e}, 0).astype({'F8' if st == 'f64' else 'F4'})"
    if dt == "bf16":
        g.dst(i, d, "u2", f"f2bf({e}, {mode!r})")
    elif dt == "f32":
        if st == "f64":
            e = f"round_mode({e}, {mode!r})" if mode in ("rz", "rm", "rp") else f"({e}).astype(F4)"
        g.dst(i, d, "f4", e)
    elif dt == "f16":
        g.dst(i, d, "f2", f"f2h_rz({e}).view(F2)" if mode == "rz" else f"({e}).astype(F2)")
    elif dt == "f64":
        g.dst(i, d, "f8", f"({e}).astype(F8)" if st != "f64" else e)
    else:
        g.unsupported(i)


def _cvt_pack(g, i):
    ts = [m for m in i.mods if m in TYPE_SIZES]
    a, b = g.src(i.ops[1], "s4"), g.src(i.ops[2], "s4")
    if ts[0] in ("u16", "s16"):
        k = TYPE_KIND[ts[0]].upper()
        g.dst(i, i.ops[0], "u4", f"pack2(isat({b}, {k}).view(U2), isat({a}, {k}).view(U2))")
        return
    k = TYPE_KIND[ts[0]].upper()
    c = g.src(i.ops[3], "u4") if len(i.ops) > 3 else g.kc.const("u4", 0)
    g.dst(
        i,
        i.ops[0],
        "u4",
        f"({c} << U4(16)) | (isat({a}, {k}).view(U1).astype(U4) << U4(8)) | "
        f"isat({b}, {k}).view(U1).astype(U4)",
    )
