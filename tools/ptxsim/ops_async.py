"""Emitters for cp.async, mbarrier, bulk and tensor copies, tensormap edits."""

from . import asynccopy as ac
from . import mbarriers, tma
from .access import Site
from .emitters import TYPE_SIZES, itype, op
from .ops_mem import addr_expr, base_expr
from .syntax import Addr, Reg, Vec

_ENV = {
    f.__name__: f
    for f in (
        ac.cp_commit,
        ac.cp_wait,
        ac.cp_mbar_arrive,
        ac.bulk_load,
        ac.bulk_store,
        ac.bulk_commit,
        ac.bulk_wait,
        ac.store_async,
        ac.tensor_load,
        ac.tensor_store,
        mbarriers.mb_init,
        mbarriers.mb_inval,
        mbarriers.mb_arrive,
        mbarriers.mb_tx,
        mbarriers.mb_wait,
        tma.tensormap_replace,
        tma.tensormap_copy,
    )
}


def shared_addr(g, a):
    """Full 32-bit shared address of an operand (generic addresses are truncated)."""
    return addr_expr(g, a, "shared")


@op("cp")
def _cp(g, i):
    g.kc.env.update(_ENV)
    ms = i.modset
    if "bulk" in ms:
        return _bulk(g, i)
    if "commit_group" in ms:
        g.emit("cp_commit(W)")
        return
    if "wait_group" in ms:
        g.emit(f"cp_wait(W, {g.imm_of(i.ops[0])})")
        return
    if "wait_all" in ms:
        g.emit("cp_wait(W, None)")
        return
    where = g.bind("S", g.kc.where_text(i))
    if "mbarrier" in ms:
        a = shared_addr(g, i.ops[0])
        g.emit(f"cp_mbar_arrive(W, {a}, {g.mask(i)}, {'noinc' in ms}, {where})")
        return
    size = g.imm_of(i.ops[2])
    cache_hint = "L2::cache_hint" in ms
    rest = list(i.ops[3:])
    if cache_hint and rest:
        rest.pop()
    w, n = (4, 1) if size == 4 else (8, size // 8)
    gb, goff = base_expr(g, i.ops[1], "global")
    sb, soff = base_expr(g, i.ops[0], "shared")
    gs = Site(g.kc, i, "global", w, n, goff)
    ss = Site(g.kc, i, "shared", w, n, soff, True)
    f = g.bind("cp", ac.make_cp_async(gs, ss, size))
    nsrc = "None"
    if rest:
        r = rest[0]
        if isinstance(r, Reg) and g.kc.fn.regs[r.name] == "pred":
            nsrc = f"where({g.src(r, 'b')}, U4(0), U4({size}))"
        elif g.imm_of(r) is not None and g.imm_of(r) >= size:
            nsrc = "None"
        else:
            nsrc = g.src(r, "u4")
    g.emit(f"{f}(W, {sb}, {gb}, {g.mask(i)}, {nsrc})")


def _bulk(g, i):
    ms = i.modset
    if "commit_group" in ms:
        g.emit("bulk_commit(W)")
        return
    if "wait_group" in ms:
        g.emit(f"bulk_wait(W, {g.imm_of(i.ops[0])})")
        return
    if "prefetch" in ms:
        return
    mask = g.mask(i)
    site = Site(g.kc, i, "shared", 16, 1, 0)
    s = g.bind("S", site)
    red = (
        next(
            (m for m in i.mods if m in ("add", "min", "max", "and", "or", "xor", "inc", "dec")),
            None,
        )
        if "reduce" in ms
        else None
    )
    ops = list(i.ops)
    if "L2::cache_hint" in ms:
        ops.pop()
    spaces = [m.split("::")[0] for m in i.mods if m.split("::")[0] in ("shared", "global")]
    tensor = "tensor" in ms
    if tensor and any(m.startswith(("im2col", "tile::")) for m in i.mods):
        g.unsupported(i, "tensor copy mode")
    if spaces[0] == "shared":  # load
        mc = "None"
        if "multicast::cluster" in ms:
            mc = g.src(ops.pop(), "u2")
        dst = shared_addr(g, ops[0])
        if tensor:
            coords = ops[1].extra[0].items
            tm = addr_expr(g, Addr(ops[1].base, ops[1].off), "global")
            cs = ", ".join(g.src(c, "s4") for c in coords)
            g.emit(
                f"tensor_load(W, {s}, {mask}, {dst}, {tm}, ({cs},), {shared_addr(g, ops[2])}, {mc})"
            )
            return
        from_sh = spaces[1] == "shared"
        src = shared_addr(g, ops[1]) if from_sh else addr_expr(g, ops[1], "global")
        g.emit(
            f"bulk_load(W, {s}, {mask}, {dst}, {src}, {g.src(ops[2], 'u4')}, "
            f"{shared_addr(g, ops[3])}, {mc}, {from_sh})"
        )
        return
    if tensor:
        coords = ops[0].extra[0].items
        tm = addr_expr(g, Addr(ops[0].base, ops[0].off), "global")
        cs = ", ".join(g.src(c, "s4") for c in coords)
        g.emit(f"tensor_store(W, {s}, {mask}, {shared_addr(g, ops[1])}, {tm}, ({cs},), {red!r})")
        return
    ty = itype(i)
    g.emit(
        f"bulk_store(W, {s}, {mask}, {addr_expr(g, ops[0], 'global')}, "
        f"{shared_addr(g, ops[1])}, {g.src(ops[2], 'u4')}, {red!r}, {ty!r})"
    )


def st_async(g, i):
    """st.async.shared::cluster.mbarrier::complete_tx::bytes: lands with its mbarrier."""
    g.kc.env.update(_ENV)
    t = itype(i)
    w = TYPE_SIZES[t]
    vals = i.ops[1].items if isinstance(i.ops[1], Vec) else (i.ops[1],)
    site = g.bind("S", Site(g.kc, i, "shared", w, len(vals), 0, True))
    v = ", ".join(g.src(x, f"u{w}") for x in vals)
    g.emit(
        f"store_async(W, {site}, {g.mask(i)}, {shared_addr(g, i.ops[0])}, ({v},), "
        f"{shared_addr(g, i.ops[2])})"
    )


@op("mbarrier")
def _mbarrier(g, i):
    g.kc.env.update(_ENV)
    ms = i.modset
    where = g.bind("S", g.kc.where_text(i))
    mask = g.mask(i)
    if "init" in ms:
        g.emit(f"mb_init(W, {shared_addr(g, i.ops[0])}, {mask}, {g.src(i.ops[1], 'u4')}, {where})")
        return
    if "inval" in ms:
        g.emit(f"mb_inval(W, {shared_addr(g, i.ops[0])}, {mask}, {where})")
        return
    if "try_wait" in ms or "test_wait" in ms:
        parity = "parity" in ms
        a = shared_addr(g, i.ops[1])
        arg = g.src(i.ops[2], "u4" if parity else "u8")
        t = g.tmp()
        g.emit(f"{t} = mb_wait(W, {a}, {mask}, {arg}, {parity}, {'try_wait' in ms}, {where})")
        g.emit(f"if {t} is None: return -1")
        g.dst(i, i.ops[0], "b", t)
        return
    if "pending_count" in ms:
        g.unsupported(i)
    dest = None
    ops = list(i.ops)
    if not isinstance(ops[0], Addr):
        dest = ops.pop(0)
    a = shared_addr(g, ops[0])
    arg = g.src(ops[1], "u4") if len(ops) > 1 else None
    if "arrive" in ms or "arrive_drop" in ms:
        drop = "arrive_drop" in ms
        tx = arg if "expect_tx" in ms else None
        cnt = None if "expect_tx" in ms else arg
        t = g.tmp()
        g.emit(f"{t} = mb_arrive(W, {a}, {mask}, {cnt}, {tx}, {drop}, {where})")
        if dest is not None and isinstance(dest, Reg):
            g.dst(i, dest, "u8", t)
        return
    sign = 1 if "expect_tx" in ms else -1
    g.emit(f"mb_tx(W, {a}, {mask}, {arg}, {sign}, {where})")


@op("tensormap")
def _tensormap(g, i):
    g.kc.env.update(_ENV)
    where = g.bind("S", g.kc.where_text(i))
    if "replace" in i.modset:
        field = i.mods[2] if i.mods[1] == "tile" else i.mods[1]
        sp = "shared" if any(m.startswith("shared") for m in i.mods) else "global"
        a = addr_expr(g, i.ops[0], sp)
        idx = None
        val = i.ops[-1]
        if len(i.ops) == 3:
            idx = g.imm_of(i.ops[1])
        wide = "b64" in i.modset
        v = g.src(val, "u8" if wide else "u4")
        g.emit(f"tensormap_replace(W, {g.mask(i)}, {field!r}, {a}, {sp!r}, {idx}, {v}, {where})")
        return
    if "cp_fenceproxy" in i.modset:
        ga = addr_expr(g, i.ops[0], "global")
        sa = shared_addr(g, i.ops[1])
        g.emit(f"tensormap_copy(W, {ga}[0], {sa}[0], {g.imm_of(i.ops[2])})")
        return
    g.unsupported(i)
