"""PTX text -> a light syntax tree (:class:`~.syntax.PtxModule`)."""

import re

from .errors import PtxSyntaxError
from .syntax import (
    TYPE_SIZES,
    Addr,
    Function,
    Imm,
    Ins,
    Not,
    Pair,
    PtxModule,
    Reg,
    Special,
    Sym,
    Var,
    Vec,
)
from .text import ID, NUMBER, SPECIAL, parse_number, split_top, strip_comments


class _Parser:
    def __init__(self, text):
        self.src = text
        self.text = strip_comments(text)
        self.pos = 0
        self.mod = PtxModule(text)
        self._line_starts = [0] + [m.end() for m in re.finditer("\n", self.text)]
        self._li = 0
        self.loc = None

    def line_at(self, pos):
        li = self._li
        ls = self._line_starts
        if li >= len(ls) or ls[li] > pos:
            li = 0
        while li + 1 < len(ls) and ls[li + 1] <= pos:
            li += 1
        self._li = li
        return li + 1

    def error(self, msg):
        raise PtxSyntaxError(f"PTX line {self.line_at(self.pos)}: {msg}")

    _ws = re.compile(r"\s*")

    def skip_ws(self):
        self.pos = self._ws.match(self.text, self.pos).end()

    def rest_of_line(self):
        e = self.text.find("\n", self.pos)
        e = len(self.text) if e < 0 else e
        s = self.text[self.pos : e]
        self.pos = e
        return s

    def until_semicolon(self):
        e = self.text.find(";", self.pos)
        if e < 0:
            self.error("missing ';'")
        s = self.text[self.pos : e]
        self.pos = e + 1
        return s

    # ------------------------------------------------------------ module level
    _word = re.compile(r"\.[a-zA-Z_0-9]+(?:::[a-z_0-9]+)?")

    def parse(self):
        text, n = self.text, len(self.text)
        # .file lines come last in nvcc output; gather them first
        for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', text):
            d, f = (m.group(2), m.group(3)) if m.group(3) else ("", m.group(2))
            self.mod.files[int(m.group(1))] = (d + "/" + f) if d and not f.startswith("/") else f
        while True:
            self.skip_ws()
            if self.pos >= n:
                return self.mod
            m = self._word.match(text, self.pos)
            if not m:
                self.error(f"unexpected text {text[self.pos : self.pos + 30]!r}")
            w = m.group(0)
            if w == ".version":
                self.mod.version = self.rest_of_line().split()[1]
            elif w == ".target":
                self.mod.target = self.rest_of_line().split()[1].rstrip(",")
            elif w in (".address_size", ".file", ".loc"):
                self.rest_of_line()
            elif w == ".pragma":
                self.until_semicolon()
            elif w == ".section":
                self.pos = self._match_brace(text.index("{", self.pos)) + 1
            elif w == ".alias":
                self.until_semicolon()
            else:
                self.top_decl()

    def _match_brace(self, p):
        depth = 0
        for m in re.compile(r"[{}]").finditer(self.text, p):
            depth += 1 if m.group(0) == "{" else -1
            if depth == 0:
                return m.start()
        self.error("unbalanced braces")

    _func_head = re.compile(r"(?:\.(?:visible|extern|weak|common)\s+)*\.(entry|func)\b")

    def top_decl(self):
        m = self._func_head.match(self.text, self.pos)
        if m:
            return self.function(m)
        line = self.line_at(self.pos)
        s = self.until_semicolon()
        self._li = line - 1
        v = self.parse_var(s)
        for x in v:
            self.mod.globals[x.name] = x

    def parse_var(self, s):
        """Parse ``.global .align 4 .b8 name[16] = {..}`` (possibly several names)."""
        init = None
        if "=" in s:
            s, init = s.split("=", 1)
        words = s.split(None)
        space = typ = None
        align, extern, vec = 0, False, 1
        joined = " ".join(words)
        while True:
            m = re.match(r"\s*\.([a-z0-9_:]+)(?:\s*\(([^)]*)\))?", joined)
            if not m:
                break
            w = m.group(1)
            joined = joined[m.end() :]
            if w in ("visible", "weak", "common"):
                pass
            elif w == "extern":
                extern = True
            elif w in ("global", "const", "shared", "local", "param", "reg"):
                space = w
            elif w in ("shared::cta",):
                space = "shared"
            elif w == "align":
                m2 = re.match(r"\s*(\d+)", joined)
                align = int(m2.group(1))
                joined = joined[m2.end() :]
            elif w in ("v2", "v4", "v8"):
                vec = int(w[1:])
            elif w in TYPE_SIZES:
                typ = w
            elif w in ("ptr", "attribute", "managed"):
                # .ptr .global .align 16 : the alignment is of the pointee
                if w == "ptr":
                    m3 = re.match(r"\s*(\.(global|shared|const|local)\s*)?(\.align\s+\d+)?", joined)
                    joined = joined[m3.end() :]
            else:
                self.error(f"unknown qualifier .{w} in declaration")
        out = []
        for part in split_top(joined):
            m = re.match(rf"^\s*({ID})(?:<(\d+)>)?((?:\s*\[\s*\d*\s*\])*)\s*$", part)
            if not m:
                self.error(f"cannot parse declaration {part!r}")
            name, rng, dims = m.groups()
            count, empty = vec, False
            for d in re.findall(r"\[\s*(\d*)\s*\]", dims):
                if d == "":
                    empty = True
                else:
                    count *= int(d)
            es = TYPE_SIZES[typ]
            if rng is not None:
                for k in range(int(rng)):
                    out.append(Var(f"{name}{k}", space, typ, align or es, es, 1))
                continue
            vals = self.parse_init(init) if init is not None else None
            if empty and vals is not None:
                count, empty = len(vals), False
            out.append(
                Var(
                    name,
                    space,
                    typ,
                    align or es * vec,
                    0 if empty else es * count,
                    count,
                    vals,
                    extern or empty,
                )
            )
        return out

    def parse_init(self, s):
        s = s.strip()
        flat = re.sub(r"[{}]", " ", s)
        out = []
        for tok in split_top(flat):
            tok = tok.strip()
            if not tok:
                continue
            mm = re.match(r"^(0x[0-9A-Fa-f]+|\d+)\s*\(\s*(.+)\s*\)$", tok)  # mask(sym)
            if mm:
                sym = mm.group(2)
                mask = int(mm.group(1), 0)
                out.append(("masked", mask, sym.strip()))
                continue
            if NUMBER.match(tok):
                out.append(parse_number(tok))
                continue
            mm = re.match(rf"^generic\s*\(\s*({ID})\s*\)\s*(?:\+\s*(\d+))?$", tok) or re.match(
                rf"^({ID})\s*(?:\+\s*(\d+))?$", tok
            )
            if not mm:
                self.error(f"cannot parse initialiser {tok!r}")
            out.append(("sym", mm.group(1), int(mm.group(2) or 0)))
        return out

    # ------------------------------------------------------------ functions
    def function(self, m):
        entry = m.group(1) == "entry"
        self.pos = m.end()
        self.skip_ws()
        rets = []
        if not entry and self.text[self.pos] == "(":
            e = self.text.index(")", self.pos)
            rets = self.param_list(self.text[self.pos + 1 : e])
            self.pos = e + 1
            self.skip_ws()
        nm = re.compile(ID).match(self.text, self.pos)
        if not nm:
            self.error("function name expected")
        fn = Function(nm.group(0), entry, rets=rets)
        self.pos = nm.end()
        self.skip_ws()
        if self.text[self.pos] == "(":
            depth, e = 0, self.pos
            while True:
                ch = self.text[e]
                depth += ch == "("
                depth -= ch == ")"
                if depth == 0:
                    break
                e += 1
            fn.params = self.param_list(self.text[self.pos + 1 : e])
            self.pos = e + 1
        while True:
            self.skip_ws()
            ch = self.text[self.pos]
            if ch == ";":
                self.pos += 1
                fn.declared_only = True
                break
            if ch == "{":
                self.pos += 1
                self.body(fn)
                break
            mm = re.compile(r"\.([a-z_]+)([^\n{;]*)").match(self.text, self.pos)
            if not mm:
                self.error("bad function attribute")
            nums = [int(x) for x in re.findall(r"\d+", mm.group(2))]
            fn.attrs[mm.group(1)] = nums or True
            self.pos = mm.end()
        old = self.mod.functions.get(fn.name)
        if old is None or old.declared_only:
            self.mod.functions[fn.name] = fn

    def param_list(self, s):
        out = []
        for part in split_top(s):
            if part.strip():
                out.extend(self.parse_var(part.strip()))
        return out

    _label = re.compile(rf"({ID})\s*:(?!:)")
    _stmt_end = re.compile(r"[;{}]")

    def body(self, fn):
        text = self.text
        scopes = [{}]
        counter = [0]

        def declare(name, suffix):
            scoped = name if len(scopes) == 1 else f"{name}@{suffix}"
            scopes[-1][name] = scoped
            return scoped

        def lookup(name):
            for s in reversed(scopes):
                if name in s:
                    return s[name]
            return None

        self._lookup, self._fn = lookup, fn
        scope_ids = [0]
        labels = set()
        while True:
            self.skip_ws()
            if self.pos >= len(text):
                self.error("unexpected end of function")
            ch = text[self.pos]
            if ch == "{":
                counter[0] += 1
                scopes.append({})
                scope_ids.append(counter[0])
                # labels declared in this scope must be known before use
                end = self._match_brace(self.pos)
                if end - self.pos < 20000:
                    for mm in re.finditer(
                        rf"(?:^|[;{{\n])\s*({ID})\s*:(?!:)", text[self.pos : end]
                    ):
                        declare(mm.group(1), counter[0])
                self.pos += 1
                continue
            if ch == "}":
                self.pos += 1
                scopes.pop()
                scope_ids.pop()
                if not scopes:
                    return
                continue
            if ch == ";":
                self.pos += 1
                continue
            m = self._label.match(text, self.pos)
            if m:
                name = m.group(1)
                self.pos = m.end()
                self.skip_ws()
                if text.startswith(".branchtargets", self.pos):
                    self.pos += len(".branchtargets")
                    fn.targets[name] = [
                        lookup(x) or x
                        for x in (t.strip() for t in self.until_semicolon().split(","))
                    ]
                    continue
                if text.startswith(".callprototype", self.pos):
                    self.until_semicolon()
                    continue
                fn.body.append(("label", lookup(name) or name))
                labels.add(name)
                continue
            if ch == ".":
                w = self._word.match(text, self.pos).group(0)
                if w == ".loc":
                    s = self.rest_of_line()
                    nums = s.split()
                    line = int(nums[2])
                    inl = re.search(r"inlined_at\s+(\d+)\s+(\d+)", s)
                    self.loc = (int(nums[1]), line)
                    if inl:
                        self.loc = (int(nums[1]), line, int(inl.group(1)), int(inl.group(2)))
                    continue
                if w in (".pragma", ".attribute"):
                    self.until_semicolon()
                    continue
                if w == ".file":
                    self.rest_of_line()
                    continue
                s = self.until_semicolon()
                for v in self.parse_var(s):
                    scoped = declare(v.name, scope_ids[-1])
                    if v.space == "reg":
                        fn.regs[scoped] = v.type
                    else:
                        v.name = scoped
                        fn.vars[scoped] = v
                continue
            start = self.pos
            s = self.until_semicolon()
            self.statement(fn, s, start)

    _guard = re.compile(rf"^@(!?)\s*({ID})\s+")

    def statement(self, fn, s, start):
        s = " ".join(s.split())
        pred = None
        m = self._guard.match(s)
        if m:
            r = self.operand(m.group(2))
            pred = (r, m.group(1) == "!")
            body = s[m.end() :]
        else:
            body = s
        sp = body.split(None, 1)
        opfull = sp[0]
        rest = sp[1] if len(sp) > 1 else ""
        parts = opfull.split(".")
        op, mods = parts[0], tuple(parts[1:])
        if op == "call":
            ops = self.call_operands(rest)
        else:
            ops = [self.operand(t) for t in split_top(rest)] if rest else []
        line = self.line_at(start)
        fn.body.append(Ins(op, mods, ops, pred, line, self.loc, s))

    def call_operands(self, rest):
        parts = split_top(rest)
        rets, args = [], []
        i = 0
        if parts and parts[0].startswith("("):
            rets = [self.operand(t) for t in split_top(parts[0][1:-1])]
            i = 1
        target = self.operand(parts[i])
        i += 1
        if i < len(parts) and parts[i].startswith("("):
            inner = parts[i][1:-1].strip()
            args = [self.operand(t) for t in split_top(inner)] if inner else []
            i += 1
        return [target, tuple(rets), tuple(args)]

    def operand(self, t):
        t = t.strip()
        if not t:
            self.error("empty operand")
        ch = t[0]
        if ch == "{":
            return Vec(tuple(self.operand(x) for x in split_top(t[1:-1])))
        if ch == "[":
            return self.address(t[1:-1].strip())
        if ch == "!":
            return Not(self.operand(t[1:]))
        if "|" in t:
            a, b = t.split("|", 1)
            return Pair(self.operand(a), self.operand(b))
        if NUMBER.match(t):
            return parse_number(t)
        if SPECIAL.match(t):
            return Special(t)
        m = re.match(rf"^({ID})((?:::[A-Za-z_0-9]+|\.[A-Za-z0-9_]+)*)$", t)
        if m:
            name = m.group(1)
            r = self._lookup(name)
            if r is not None:
                if r in self._fn.regs:
                    return Reg(r)
                return Sym(r)
            return Sym(t)
        m = re.match(rf"^({ID})\s*\+\s*(-?\d+)$", t)
        if m:
            nm = self._lookup(m.group(1)) or m.group(1)
            return Addr(Sym(nm), int(m.group(2)))
        if re.match(r"^[-+~()\d\sxXa-fA-F*<>|&^]+$", t):
            return Imm(int(eval(t, {"__builtins__": {}})), "i")  # constant expression
        self.error(f"cannot parse operand {t!r}")

    def address(self, t):
        parts = split_top(t)
        extra = tuple(self.operand(p) for p in parts[1:]) if len(parts) > 1 else None
        t = parts[0]
        m = re.match(rf"^({ID})\s*(?:([+-])\s*(-?\s*(?:0[xX])?[0-9a-fA-F]+))?$", t)
        if m:
            off = 0
            if m.group(3):
                off = int(m.group(3).replace(" ", ""), 0)
                if m.group(2) == "-":
                    off = -off
            base = self.operand(m.group(1))
            return Addr(base, off, extra)
        return Addr(self.operand(t), 0, extra)


def parse(text):
    """Parse PTX text and return a :class:`PtxModule`."""
    return _Parser(text).parse()
