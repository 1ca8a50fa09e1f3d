"""Control-flow graph: call inlining, basic blocks, liveness and reconvergence order."""

from dataclasses import dataclass, field, replace

from .errors import Unsupported
from .syntax import Addr, Function, Ins, Not, Pair, Reg, Sym, Vec

BUILTIN_CALLS = {"vprintf", "__assertfail", "malloc", "free"}


@dataclass
class Block:
    """A straight-line run of instructions; ``term`` is the last one if it transfers control."""

    index: int
    ins: list = field(default_factory=list)
    label: str = None
    succ: list = field(default_factory=list)
    term: object = None
    live_out: set = field(default_factory=set)


# ---------------------------------------------------------------- inlining
def _map_operand(op, f):
    if isinstance(op, (Reg, Sym)):
        return f(op)
    if isinstance(op, Addr):
        extra = None if op.extra is None else tuple(_map_operand(x, f) for x in op.extra)
        return Addr(_map_operand(op.base, f), op.off, extra)
    if isinstance(op, Vec):
        return Vec(tuple(_map_operand(x, f) for x in op.items))
    if isinstance(op, Pair):
        return Pair(_map_operand(op.a, f), _map_operand(op.b, f))
    if isinstance(op, Not):
        return Not(_map_operand(op.reg, f))
    if isinstance(op, tuple):
        return tuple(_map_operand(x, f) for x in op)
    return op


def inline_calls(mod, fn, depth=0):
    """Return a copy of ``fn`` with every call to a defined device function expanded."""
    if depth > 24:
        raise Unsupported(f"recursive device function {fn.name}")
    out = Function(
        fn.name,
        fn.entry,
        fn.params,
        fn.rets,
        dict(fn.regs),
        dict(fn.vars),
        [],
        fn.attrs,
        dict(fn.targets),
    )
    n = 0
    for item in fn.body:
        if isinstance(item, tuple) or item.op != "call":
            out.body.append(item)
            continue
        target, rets, args = item.ops
        name = target.name if isinstance(target, Sym) else None
        if name in BUILTIN_CALLS:
            out.body.append(item)
            continue
        callee = mod.functions.get(name)
        if callee is None or callee.declared_only:
            raise Unsupported(
                f"PTX line {item.line}: call to undefined or indirect function {name or item.text}"
            )
        callee = inline_calls(mod, callee, depth + 1)
        n += 1
        tag = f"#{depth}.{n}.{name[:24]}.{item.line}"
        regmap = {}
        binding = {p.name: a.name for p, a in zip(callee.params, args) if isinstance(a, Sym)}
        binding.update({p.name: a.name for p, a in zip(callee.rets, rets) if isinstance(a, Sym)})
        for _p, a in list(zip(callee.params, args)) + list(zip(callee.rets, rets)):
            if not isinstance(a, Sym):
                raise Unsupported(f"PTX line {item.line}: register call arguments")
        labels = {x[1] for x in callee.body if isinstance(x, tuple)}

        def ren(op):
            if isinstance(op, Reg):
                if op.name not in regmap:
                    regmap[op.name] = op.name + tag
                return Reg(regmap[op.name])
            if op.name in binding:
                return Sym(binding[op.name])
            if op.name in labels or op.name in callee.vars or op.name in callee.targets:
                return Sym(op.name + tag)
            return op

        for r, t in callee.regs.items():
            out.regs[r + tag] = t
        for v in callee.vars.values():
            out.vars[v.name + tag] = replace(v, name=v.name + tag)
        for k, ts in callee.targets.items():
            out.targets[k + tag] = [t + tag for t in ts]
        end = f"$ret{tag}"
        if item.pred:
            skip = Ins(
                "bra",
                (),
                [Sym(end)],
                (item.pred[0], not item.pred[1]),
                item.line,
                item.loc,
                item.text,
            )
            out.body.append(skip)
        for x in callee.body:
            if isinstance(x, tuple):
                out.body.append(("label", x[1] + tag))
                continue
            pred = (ren(x.pred[0]), x.pred[1]) if x.pred else None
            if x.op == "ret":
                out.body.append(Ins("bra", (), [Sym(end)], pred, x.line, x.loc, x.text))
            else:
                out.body.append(
                    Ins(
                        x.op,
                        x.mods,
                        [_map_operand(o, ren) for o in x.ops],
                        pred,
                        x.line,
                        x.loc,
                        x.text,
                    )
                )
        out.body.append(("label", end))
    return out


# ---------------------------------------------------------------- uses and defs
_NO_DEF = {
    "st",
    "red",
    "bra",
    "brx",
    "bar",
    "barrier",
    "membar",
    "fence",
    "exit",
    "ret",
    "trap",
    "prefetch",
    "prefetchu",
    "call",
    "nanosleep",
    "griddepcontrol",
    "setmaxnreg",
    "stmatrix",
    "discard",
    "applypriority",
    "brkpt",
    "pmevent",
    "multimem",
    "st_bulk",
}


def regs_of(op, out):
    """Append every register name in an operand to ``out``."""
    if isinstance(op, Reg):
        out.append(op.name)
    elif isinstance(op, Addr):
        regs_of(op.base, out)
        for x in op.extra or ():
            regs_of(x, out)
    elif isinstance(op, Vec):
        for x in op.items:
            regs_of(x, out)
    elif isinstance(op, Pair):
        regs_of(op.a, out)
        regs_of(op.b, out)
    elif isinstance(op, Not):
        regs_of(op.reg, out)
    elif isinstance(op, tuple):
        for x in op:
            regs_of(x, out)
    return out


def defines(ins):
    """True if the first operand of ``ins`` is a destination."""
    op, ms = ins.op, ins.modset
    if op in _NO_DEF:
        return (op == "bar" and "red" in ms) or (op == "barrier" and "red" in ms)
    if op == "cp":
        return False
    if op == "mbarrier":
        return not (
            {"init", "inval", "expect_tx", "complete_tx"} & ms and "arrive" not in ms
        ) and not isinstance(ins.ops[0], Addr)
    if op in ("wgmma",):
        return "mma_async" in ms
    if op == "tensormap" or op == "createpolicy" or op == "mapa":
        return op != "tensormap"
    if op in ("atom", "ld", "ldu", "mov"):
        return True
    return bool(ins.ops) and not isinstance(ins.ops[0], Addr)


def uses_defs(ins):
    """(uses, defs) register names; a predicated definition also counts as a use."""
    uses, defs = [], []
    if ins.pred:
        uses.append(ins.pred[0].name)
    ops = ins.ops
    if ops and defines(ins):
        regs_of(ops[0], defs)
        for o in ops[1:]:
            regs_of(o, uses)
        if ins.pred or ins.op == "wgmma":
            uses.extend(defs)
    else:
        for o in ops:
            regs_of(o, uses)
    return uses, defs


# ---------------------------------------------------------------- blocks
def is_wait(ins):
    """Instructions that can suspend the warp and so end a block."""
    op, ms = ins.op, ins.modset
    if op == "bar":
        return "warp" not in ms
    if op == "barrier":
        return "arrive" not in ms or "cluster" not in ms
    return False


def restarts(ins):
    """Instructions that are re-executed after a wait and so begin a block."""
    return ins.op == "mbarrier" and ("try_wait" in ins.modset or "test_wait" in ins.modset)


def build(fn):
    """Split a function body into blocks with successors and liveness."""
    blocks, labels = [], {}
    cur = None

    def new():
        b = Block(len(blocks))
        blocks.append(b)
        return b

    cur = new()
    for item in fn.body:
        if isinstance(item, tuple):
            if cur.ins or cur.term:
                cur = new()
            labels[item[1]] = cur.index
            cur.label = cur.label or item[1]
            continue
        if cur.term is not None or (restarts(item) and cur.ins):
            cur = new()
        cur.ins.append(item)
        if item.op in ("bra", "brx", "exit", "ret", "trap") or is_wait(item):
            cur.term = item
    if cur.term is None or cur.term.pred or is_wait(cur.term):
        b = new()
        b.ins.append(
            Ins(
                "ret",
                (),
                [],
                None,
                fn.body[-1].line if fn.body and not isinstance(fn.body[-1], tuple) else 0,
                None,
                "ret",
            )
        )
        b.term = b.ins[0]
    for b in blocks:
        t = b.term
        nxt = b.index + 1
        if t is None:
            b.succ = [nxt]
        elif t.op == "bra":
            b.succ = [labels[t.ops[0].name]] + ([nxt] if t.pred else [])
        elif t.op == "brx":
            tl = fn.targets[t.ops[1].name]
            b.succ = sorted({labels[x] for x in tl}) + ([nxt] if t.pred else [])
        elif t.op in ("exit", "ret", "trap"):
            b.succ = [nxt] if t.pred else []
        else:
            b.succ = [nxt]
    fn.labels = labels
    _liveness(blocks)
    return blocks, _order(blocks)


def _liveness(blocks):
    gen, kill = [], []
    for b in blocks:
        g, k = set(), set()
        for i in b.ins:
            u, d = uses_defs(i)
            g.update(x for x in u if x not in k)
            k.update(d)
        gen.append(g)
        kill.append(k)
    live_in = [set(g) for g in gen]
    preds = [[] for _ in blocks]
    for b in blocks:
        for s in b.succ:
            preds[s].append(b.index)
    work = list(range(len(blocks)))[::-1]
    inwork = set(work)
    while work:
        i = work.pop()
        inwork.discard(i)
        b = blocks[i]
        out = set()
        for s in b.succ:
            out |= live_in[s]
        b.live_out = out
        new = gen[i] | (out - kill[i])
        if new != live_in[i]:
            live_in[i] = new
            for p in preds[i]:
                if p not in inwork:
                    inwork.add(p)
                    work.append(p)


def _order(blocks):
    """Priority per block: topological, with every loop contiguous and before its exits.

    Running the group of lanes with the lowest priority first makes divergent
    lanes meet again at the earliest common point.
    """
    n = len(blocks)
    succ = [list(dict.fromkeys(b.succ)) for b in blocks]
    order = []

    def sccs(nodes, edges):
        index, low, stack, on, out = {}, {}, [], set(), []
        cnt = [0]
        for root in nodes:
            if root in index:
                continue
            work = [(root, iter(edges[root]))]
            index[root] = low[root] = cnt[0]
            cnt[0] += 1
            stack.append(root)
            on.add(root)
            while work:
                v, it = work[-1]
                adv = False
                for w in it:
                    if w not in index:
                        index[w] = low[w] = cnt[0]
                        cnt[0] += 1
                        stack.append(w)
                        on.add(w)
                        work.append((w, iter(edges[w])))
                        adv = True
                        break
                    if w in on:
                        low[v] = min(low[v], index[w])
                if adv:
                    continue
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[v])
                if low[v] == index[v]:
                    comp = []
                    while True:
                        w = stack.pop()
                        on.discard(w)
                        comp.append(w)
                        if w == v:
                            break
                    out.append(comp)
        return out

    import heapq

    def visit(nodes, entry):
        nodeset = set(nodes)
        edges = {v: [w for w in succ[v] if w in nodeset and w != entry] for v in nodes}
        comps = sccs(sorted(nodes), edges)
        cid = {v: i for i, c in enumerate(comps) for v in c}
        indeg = [0] * len(comps)
        cs = [set() for _ in comps]
        for v in nodes:
            for w in edges[v]:
                if cid[w] != cid[v] and cid[w] not in cs[cid[v]]:
                    cs[cid[v]].add(cid[w])
                    indeg[cid[w]] += 1
        heap = [(min(c), i) for i, c in enumerate(comps) if indeg[i] == 0]
        heapq.heapify(heap)
        while heap:
            _, i = heapq.heappop(heap)
            c = comps[i]
            if len(c) == 1:
                order.append(c[0])
            else:
                cset = set(c)
                heads = [w for v in nodeset - cset for w in succ[v] if w in cset]
                head = min(heads) if heads else (entry if entry in cset else min(c))
                if len(c) == len(nodes) and head == entry:
                    order.extend(sorted(c))
                else:
                    visit(c, head)
            for j in cs[i]:
                indeg[j] -= 1
                if indeg[j] == 0:
                    heapq.heappush(heap, (min(comps[j]), j))

    import sys

    old = sys.getrecursionlimit()
    sys.setrecursionlimit(max(old, 5000))
    reach, st = {0}, [0]
    while st:
        for w in succ[st.pop()]:
            if w not in reach:
                reach.add(w)
                st.append(w)
    visit(sorted(reach), 0)
    sys.setrecursionlimit(old)
    rank = {b: i for i, b in enumerate(order)}
    return [rank.get(i, n + i) for i in range(n)]
