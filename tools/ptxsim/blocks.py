"""Generates the Python source of one basic block."""

import numpy as np

from .emitters import DT, EMITTERS, Lazy
from .errors import PtxError, Unsupported
from .memory import PARAM_WIN, SHARED_ORIGIN
from .syntax import TYPE_SIZES, Addr, Imm, Not, Reg, Special, Sym


class BlockGen:
    """Emits the Python function of one basic block."""

    def __init__(self, kc, block):
        self.kc, self.block = kc, block
        self.lines = []
        self.have = {}  # reg -> {kind: var} or Lazy
        self.ver = {}
        self.dirty = {}
        self.cse = {}
        self.prov = {}  # reg -> (ldmatrix result, index, version)
        self.ntmp = 0

    # ---- small utilities
    def emit(self, line):
        self.lines.append("    " + line)

    def tmp(self):
        self.ntmp += 1
        return f"t{self.ntmp}"

    def bind(self, prefix, obj):
        return self.kc.bind(prefix, obj)

    def unsupported(self, ins, why=""):
        raise Unsupported(
            f"unsupported instruction{': ' + why if why else ''} at {self.kc.where_text(ins)}"
        )

    def width(self, reg):
        return TYPE_SIZES[self.kc.fn.regs[reg]]

    def key(self, *operands):
        """Value-number key of operands, for common-subexpression reuse."""
        out = []
        for o in operands:
            if isinstance(o, Reg):
                out.append((o.name, self.ver.get(o.name, 0)))
            else:
                out.append(o)
        return tuple(out)

    # ---- sources
    def base(self, reg):
        """(kind, var) of a register in whichever kind is at hand."""
        h = self.have.get(reg)
        if isinstance(h, Lazy):
            v = f"r{self.kc.reg_index[reg]}_f4"
            self.emit(f"{v} = ascont({h.mat}.reshape(2, 32, 2)[{h.h}, :, {h.e}])")
            h = self.have[reg] = {"f4": v}
        if h is None:
            k = self.kc.kind[reg]
            v = f"r{self.kc.reg_index[reg]}_{k}"
            self.emit(f"{v} = R[{self.kc.reg_index[reg]}]")
            h = self.have[reg] = {k: v}
        return h

    def reg(self, name, kind):
        if name in self.kc.const_regs:
            im = self.kc.const_regs[name]
            w = self.width(name)
            bits = self.imm_bits(im, "u" + str(max(w, 2)) if w else kind)
            return self.kc.const(kind, bits)
        h = self.base(name)
        if kind in h:
            return h[kind]
        k0 = next(iter(h))
        v0 = h[k0]
        if k0 == kind:
            return v0
        v = f"r{self.kc.reg_index[name]}_{kind}"
        if k0 == "b" or kind == "b":
            if kind == "b":
                raise Unsupported(f"register {name} used as predicate")
            raise Unsupported(f"predicate {name} used as data")
        w0, w1 = (16 if k0 == "q" else int(k0[1:])), (16 if kind == "q" else int(kind[1:]))
        if w0 == w1:
            self.emit(f"{v} = {v0}.view({kind.upper()})")
        elif w0 > w1:
            if k0 == "q":
                self.emit(f"{v} = {v0}[:, 0].astype(U{w1}).view({kind.upper()})")
            else:
                u0 = self.reg(name, f"u{w0}")
                self.emit(
                    f"{v} = {u0}.astype(U{w1}).view({kind.upper()})"
                    if kind[0] != "u"
                    else f"{v} = {u0}.astype(U{w1})"
                )
        else:
            u0 = self.reg(name, f"u{w0}" if kind[0] != "s" else f"s{w0}")
            ext = kind if kind[0] in "us" else f"u{w1}"
            self.emit(
                f"{v} = {u0}.astype({ext.upper()})"
                + (f".view({kind.upper()})" if ext != kind else "")
            )
        h[kind] = v
        return v

    def imm_bits(self, im, kind):
        v = im.value
        if kind in ("b", "q"):
            return v
        if kind == "f4" and im.kind == "d":
            return int(
                np.float64(np.uint64(v & (2**64 - 1)).view(np.float64))
                .astype(np.float32)
                .view(np.uint32)
            )
        if kind == "f8" and im.kind == "f":
            return int(np.uint32(v).view(np.float32).astype(np.float64).view(np.uint64))
        if kind[0] == "f" and im.kind == "i":
            if kind == "f2":
                return v & 0xFFFF
            return int(np.array(float(v), DT[kind]).view(DT["u" + kind[1:]]))
        if kind[0] in "us" and im.kind == "d" and kind[1:] == "4":
            return int(np.uint64(v).view(np.float64).astype(np.float32).view(np.uint32))
        return v & ((1 << (8 * int(kind[1:]))) - 1)

    def imm_of(self, o):
        """The immediate value of an operand if statically known, else None."""
        if isinstance(o, Imm):
            return o.value
        if isinstance(o, Reg) and o.name in self.kc.const_regs:
            return self.kc.const_regs[o.name].value
        return None

    def src(self, o, kind):
        """Python expression (a local or global name) for a source operand."""
        if isinstance(o, Reg):
            return self.reg(o.name, kind)
        if isinstance(o, Imm):
            return self.kc.const(kind, self.imm_bits(o, kind))
        if isinstance(o, Special):
            return self.special(o.name, kind)
        if isinstance(o, Sym):
            return self.symbol(o.name, 0, kind)
        if isinstance(o, Addr) and isinstance(o.base, Sym):
            return self.symbol(o.base.name, o.off, kind)
        if isinstance(o, Not):
            return f"(~{self.src(o.reg, kind)})"
        raise Unsupported(f"operand {o} in {self.cur.text}")

    def special(self, name, kind):
        if name in (
            "%clock",
            "%clock64",
            "%globaltimer",
            "%globaltimer_lo",
            "%clock_hi",
            "%globaltimer_hi",
        ):
            return f"W.clock({name[1:]!r}).astype({kind.upper()})"
        t = self.tmp()
        self.emit(f"{t} = W.sp[{name[1:]!r}]")
        w = 8 if name in ("%gridid",) else 4
        if kind != f"u{w}":
            if kind[1:] == str(w):
                return f"{t}.view({kind.upper()})"
            return f"{t}.astype({kind.upper()})"
        return t

    def symbol(self, name, off, kind):
        kc = self.kc
        if name in kc.shared_off:
            o = SHARED_ORIGIN + kc.shared_off[name] + off
            return f"W.cta.shaddr({o}, {kind.upper()})"
        if name in kc.local_off:
            return kc.const(kind, kc.local_off[name] + off)
        if name in kc.param_off:
            return kc.const(kind, PARAM_WIN + kc.param_off[name] + off)
        g = kc.module.global_address(name)
        if g is not None:
            return kc.const(kind, g + off)
        raise Unsupported(f"address of {name} at {kc.where_text(self.cur)}")

    # ---- destinations
    def dst(self, ins, o, kind, expr, guard=True):
        """Define a destination operand from an expression of the given kind."""
        if isinstance(o, Sym) and o.name == "_":
            self.emit(f"{expr}")
            return
        if not isinstance(o, Reg):
            raise Unsupported(f"destination {o} at {self.kc.where_text(ins)}")
        name = o.name
        if name in self.kc.const_regs:
            return
        rk = self.kc.fn.regs[name]
        w = TYPE_SIZES[rk]
        if rk == "pred":
            w, k2 = 0, "b"
        elif kind == "b":
            raise Unsupported(f"predicate into {name} at {self.kc.where_text(ins)}")
        elif kind == "q":
            k2 = "q"
        else:
            kw = int(kind[1:])
            rw = 2 if w == 1 else w
            k2 = kind
            if kw < rw:
                if rw == 16:
                    expr, k2 = f"to_q({expr})", "q"
                else:
                    if kind[0] == "f":
                        expr, kind = f"({expr}).view(U{kw})", f"u{kw}"
                    k2 = f"{kind[0]}{rw}"
                    expr = f"({expr}).astype({k2.upper()})"
            elif kw > rw:
                k2 = f"u{rw}"
                expr = f"({expr}).astype({k2.upper()})"
        var = f"r{self.kc.reg_index[name]}_{k2}"
        if guard and ins.pred:
            p = self.pred(ins)
            old = self.reg(name, k2)
            self.emit(
                f"{var} = where({p}, {expr}, {old})"
                if k2 != "q"
                else f"{var} = where({p}[:, None], {expr}, {old})"
            )
        else:
            self.emit(f"{var} = {expr}")
        self.set_local(name, {k2: var})

    def set_local(self, name, h):
        self.have[name] = h
        self.ver[name] = self.ver.get(name, 0) + 1
        self.dirty[name] = True

    def pred(self, ins):
        r, neg = ins.pred
        v = self.reg(r.name, "b")
        if not neg:
            return v
        key = ("not", r.name, self.ver.get(r.name, 0))
        if key not in self.cse:
            t = self.tmp()
            self.emit(f"{t} = ~{v}")
            self.cse[key] = t
        return self.cse[key]

    def mask(self, ins):
        """Expression for the lanes that execute ``ins`` (None when all 32)."""
        if not ins.pred:
            return "m"
        p = self.pred(ins)
        key = ("mask", p, self.ver.get(ins.pred[0].name, 0))
        if key not in self.cse:
            t = self.tmp()
            self.emit(f"{t} = gmask({p}, m)")
            self.cse[key] = t
        return self.cse[key]

    # ---- registers to memory
    def flush_regs(self, names):
        """Store dirty locals of the given registers to ``R``."""
        names = [n for n in names if self.dirty.get(n)]
        if not names:
            return
        full, part = [], []
        for n in names:
            if n in self.kc.const_regs:
                continue
            v = self.reg(n, self.kc.kind[n])
            i = self.kc.reg_index[n]
            full.append(f"R[{i}] = {v}")
            if self.kc.kind[n] == "q":
                part.append(f"R[{i}] = where(m[:, None], {v}, R[{i}])")
            else:
                part.append(f"R[{i}] = where(m, {v}, R[{i}])")
            self.dirty.pop(n)
        if not full:
            return
        self.emit("if m is None:")
        for x in full:
            self.emit("    " + x)
        self.emit("else:")
        for x in part:
            self.emit("    " + x)

    def finish(self):
        live = self.block.live_out
        self.flush_regs([n for n in self.dirty if n in live or n in self.kc.wgregs])
        self.dirty.clear()

    def drop(self, names):
        """Forget cached locals of registers that ``R`` now holds."""
        for n in names:
            self.have.pop(n, None)
            self.ver[n] = self.ver.get(n, 0) + 1

    # ---- main
    def generate(self):
        b = self.block
        for i in b.ins:
            self.cur = i
            if i is b.term:
                break
            f = EMITTERS.get(i.op)
            if f is None:
                self.unsupported(i)
            try:
                f(self, i)
            except Unsupported:
                raise
            except PtxError:
                raise
            except Exception as e:
                raise Unsupported(
                    f"cannot compile {self.kc.where_text(i)}: {type(e).__name__}: {e}"
                ) from e
        self.terminator()
        if not self.lines:
            self.emit("pass")
        return f"def b{b.index}(W, R, m):\n" + "\n".join(self.lines) + "\n"

    def terminator(self):
        b, t = self.block, self.block.term
        nxt = b.index + 1
        if t is None:
            self.finish()
            self.emit(f"return {nxt}")
            return
        self.cur = t
        if t.op == "bra":
            if t.pred:
                p = self.pred(t)
                self.finish()
                tgt = b.succ[0]
                if tgt == nxt:
                    self.emit(f"return {nxt}")
                    return
                self.emit("if m is None:")
                self.emit(f"    t = {p}.tobytes()")
                self.emit(f"    if t == ALL: return {tgt}")
                self.emit(f"    if t == NONE: return {nxt}")
                self.emit(f"    return W.split({p}, {tgt}, {nxt})")
                self.emit(f"q = {p} & m")
                self.emit("t = q.tobytes()")
                self.emit(f"if t == NONE: return {nxt}")
                self.emit(f"if t == m.tobytes(): return {tgt}")
                self.emit(f"return W.split(q, {tgt}, {nxt})")
            else:
                self.finish()
                self.emit(f"return {b.succ[0]}")
            return
        if t.op in ("exit", "ret"):
            p = self.mask(t) if t.pred else "m"
            self.finish()
            self.emit(f"return W.exit({p}, {nxt})")
            return
        if t.op == "trap":
            s = self.bind("S", self.kc.where_text(t))
            p = self.mask(t)
            self.finish()
            self.emit(f"W.trap({p}, {s})")
            self.emit(f"return {nxt}")
            return
        if t.op == "brx":
            idx = self.src(t.ops[0], "u4")
            tl = [self.kc.fn.labels[x] for x in self.kc.fn.targets[t.ops[1].name]]
            if t.pred:
                self.unsupported(t)
            self.finish()
            self.emit(f"return W.switch({idx}, m, {tuple(tl)})")
            return
        EMITTERS[t.op](self, t)
