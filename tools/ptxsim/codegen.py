"""Compiles basic blocks to Python source operating on 32-lane numpy vectors.

Each block becomes ``def b(W, R, m)``: ``W`` is the warp, ``R`` its register list and ``m``
the active-lane mask (``None`` when all 32 lanes are active).  It returns the index of the
next block, or a negative number when the scheduler has to look at the warp again.
Register values are immutable arrays, so ``mov`` is an alias.
"""

import numpy as np

from . import (  # noqa: F401
    cfg,
    helpers,
    ops_async,
    ops_compare,
    ops_float,
    ops_integer,
    ops_mem,
    ops_mma,
    ops_wgmma,
)
from .blocks import BlockGen
from .emitters import DT, REG_KIND, TYPE_KIND, itype
from .syntax import TYPE_SIZES, Addr, Imm, Reg, Sym, Vec


class KernelCode:
    """A compiled kernel: block functions plus everything static about it."""

    def __init__(self, module, fn):
        self.module = module
        self.name = fn.name
        self.entry = fn
        self.fn = cfg.inline_calls(module.ast, fn)
        self.blocks, self.order = cfg.build(self.fn)
        self.reg_index = {r: i for i, r in enumerate(self.fn.regs)}
        self.sites = []
        self.env = dict(helpers.ENV)
        self._consts = {}
        self.is_reg_pred = {r for r, t in self.fn.regs.items() if t == "pred"}
        self._layout_vars()
        self._const_regs()
        self._canonical()
        self.reg_kinds = [self.kind[r] for r in self.fn.regs]
        self._inflight_regs()
        self.granule = self._granule()
        self.funcs = [None] * len(self.blocks)
        self.has_global_atomics = any(
            i.op in ("atom", "red") and "shared" not in i.modset and "shared::cta" not in i.modset
            for b in self.blocks
            for i in b.ins
        )
        self.source = {}

    # ------------------------------------------------------------ static layout
    def _layout_vars(self):
        off, self.local_off = 0, {}
        for v in self.fn.vars.values():
            if v.space in ("local", "param"):
                off = (off + v.align - 1) // v.align * v.align
                self.local_off[v.name] = off
                off += v.size
        self.local_size = (off + 31) // 32 * 32
        used = set()
        for b in self.blocks:
            for i in b.ins:
                self._syms(i.ops, used)
        off, self.shared_off, dyn = 0, {}, []
        cands = [v for v in self.fn.vars.values() if v.space == "shared"]
        cands += [
            v for v in self.module.ast.globals.values() if v.space == "shared" and v.name in used
        ]
        for v in cands:
            if v.extern or v.size == 0:
                dyn.append(v)
                continue
            off = (off + v.align - 1) // v.align * v.align
            self.shared_off[v.name] = off
            off += v.size
        self.static_shared = off
        al = max([v.align for v in dyn], default=16)
        off = (off + max(al, 16) - 1) // max(al, 16) * max(al, 16)
        self.dyn_shared_off = off
        for v in dyn:
            self.shared_off[v.name] = off
        off, self.param_off = 0, {}
        for p in self.fn.params:
            off = (off + p.align - 1) // p.align * p.align
            self.param_off[p.name] = off
            off += p.size
        self.param_size = off

    def _syms(self, o, out):
        if isinstance(o, Sym):
            out.add(o.name)
        elif isinstance(o, Addr):
            self._syms(o.base, out)
            for x in o.extra or ():
                self._syms(x, out)
        elif isinstance(o, (list, tuple)):
            for x in o:
                self._syms(x, out)
        elif isinstance(o, Vec):
            for x in o.items:
                self._syms(x, out)

    def _const_regs(self):
        """Registers with a single unpredicated ``mov reg, imm`` are constants."""
        ndef, imm = {}, {}
        for b in self.blocks:
            for i in b.ins:
                _, d = cfg.uses_defs(i)
                for r in d:
                    ndef[r] = ndef.get(r, 0) + 1
                if (
                    i.op == "mov"
                    and not i.pred
                    and isinstance(i.ops[0], Reg)
                    and isinstance(i.ops[1], Imm)
                ):
                    imm[i.ops[0].name] = i.ops[1]
        self.const_regs = {
            r: v for r, v in imm.items() if ndef[r] == 1 and self.fn.regs.get(r) != "b128"
        }

    def _canonical(self):
        """Pick the numpy kind each register is stored as between blocks."""
        votes = {}
        for b in self.blocks:
            for i in b.ins:
                t = itype(i)
                k = TYPE_KIND.get(t)
                if k not in ("f4", "f8", "f2"):
                    k = None
                for o in i.ops:
                    for r in [o] if isinstance(o, Reg) else o.items if isinstance(o, Vec) else ():
                        if isinstance(r, Reg):
                            votes.setdefault(r.name, {})
                            votes[r.name][k] = votes[r.name].get(k, 0) + 1
        self.kind = {}
        for r, t in self.fn.regs.items():
            base = "b" if t == "pred" else REG_KIND[TYPE_SIZES[t]]
            v = votes.get(r, {})
            best = max(v, key=v.get) if v else None
            if best is not None and base[1:] == best[1:]:
                base = best
            self.kind[r] = base

    def _inflight_regs(self):
        """wgmma accumulators and every register they may be moved to before a wait."""
        s = set()
        for b in self.blocks:
            for i in b.ins:
                if i.op == "wgmma" and "mma_async" in i.modset:
                    s.update(cfg.regs_of(i.ops[0], []))
        self.wgregs_base = bool(s)
        changed = bool(s)
        while changed:
            changed = False
            for b in self.blocks:
                for i in b.ins:
                    if (
                        i.op == "mov"
                        and len(i.ops) == 2
                        and isinstance(i.ops[0], Reg)
                        and isinstance(i.ops[1], Reg)
                        and i.ops[1].name in s
                        and i.ops[0].name not in s
                    ):
                        s.add(i.ops[0].name)
                        changed = True
        self.wgregs = s
        for r in s:
            self.const_regs.pop(r, None)

    def _granule(self):
        """Smallest shared-memory access width, which is exact for aligned accesses."""
        g = 16
        for b in self.blocks:
            for i in b.ins:
                if i.op in ("ld", "st", "atom", "red", "cp"):
                    if i.modset & {"global", "param", "local", "const"} and "shared" not in i.name:
                        continue
                    t = itype(i)
                    w = TYPE_SIZES.get(t, 4) if i.op != "cp" else 4
                    if i.op == "cp" and ("bulk" in i.modset):
                        w = 16 if "tensor" not in i.modset else 4
                    g = min(g, w)
        return max(1, min(g, 4))

    # ------------------------------------------------------------ constants
    def const(self, kind, bits):
        """Name of a read-only 32-lane constant with the given bit pattern."""
        key = (kind, bits)
        name = self._consts.get(key)
        if name is None:
            name = f"K{len(self._consts)}_{kind}"
            self._consts[key] = name
            if kind == "b":
                a = np.full(32, bool(bits))
            elif kind == "q":
                a = np.zeros((32, 2), np.uint64)
                a[:, 0] = bits & (2**64 - 1)
            else:
                w = np.dtype(DT[kind]).itemsize
                u = DT["u" + str(w)]
                a = np.full(32, bits & ((1 << (8 * w)) - 1), u).view(DT[kind])
            a.flags.writeable = False
            self.env[name] = a
        return name

    def bind(self, prefix, obj):
        """Make a Python object visible to generated code; returns its name."""
        name = f"{prefix}{len(self.env)}"
        self.env[name] = obj
        return name

    def where_text(self, ins):
        """``PTX line, source line, instruction`` text for messages."""
        s = f"PTX line {ins.line}"
        src = self.source_of(ins)
        if src:
            s += f" ({src})"
        return f"{s}: {ins.text[:160]}"

    def source_of(self, ins):
        """``file:line`` of an instruction, from ``.loc``."""
        if not ins.loc:
            return None
        f = self.module.ast.files.get(ins.loc[0], "?")
        s = f"{f.rsplit('/', 1)[-1]}:{ins.loc[1]}"
        if len(ins.loc) == 4:
            f2 = self.module.ast.files.get(ins.loc[2], "?")
            s += f", inlined at {f2.rsplit('/', 1)[-1]}:{ins.loc[3]}"
        return s

    # ------------------------------------------------------------ compile
    def compile(self):
        """Generate and compile all blocks."""
        if self.funcs[0] is not None:
            return self
        chunks = []
        for b in self.blocks:
            g = BlockGen(self, b)
            chunks.append(g.generate())
        text = "\n".join(chunks)
        self.py_source = text
        code = compile(text, f"<ptxsim {self.name}>", "exec")
        exec(code, self.env)
        self.funcs = [self.env[f"b{b.index}"] for b in self.blocks]
        from .metrics import classify

        self.block_classes = []
        for b in self.blocks:
            d = {}
            for i in b.ins:
                c = classify(i)
                d[c] = d.get(c, 0) + 1
            self.block_classes.append(d)
        return self
