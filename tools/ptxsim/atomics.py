"""Atomic read-modify-write instructions."""

import numpy as np

from .access import ATOMIC, M64
from .floats import bf2f, f2bf
from .helpers import F2, LANES, U1, U2, U4, U8


def atomic(site, fn, returns, ufunc=None):
    """Read-modify-write; ``fn(old, a, b) -> new`` on Python/numpy scalars."""
    w, n = site.w, site.n
    gidx = site.global_index()
    dt = {1: U1, 2: U2, 4: U4, 8: U8}[w]
    kindv = site.vkind
    key = (w, n)

    def lanes_of(W, addr, m):
        """-> [(flat view, lanes, indices)]"""
        sp = site.space
        if sp == "generic":
            a = addr + U8(site.off & M64)
            first = 0 if m is None else int(m.argmax())
            sp = "shared" if int(a[first]) >> 48 == 1 else "global"
            if sp == "shared":
                addr = addr.astype(U4)
        if sp == "shared":
            cta = W.cta
            res = []
            for c, lanes, idx in site.shared_fault(W, addr, m):
                if W.check:
                    mm = np.zeros(32, bool)
                    mm[lanes] = True
                    if b"\0" in c.svalid[key].take(idx, 0).tobytes():
                        site.raise_uninit(W, c, addr, mm)
                    if c is cta:
                        W.log.append((site, idx, ATOMIC))
                res.append((c.srows[key], lanes, idx))
            if site.metrics:
                site.note(addr, m)
            return res
        if site.metrics:
            site.note(addr + U8(site.off & M64), m)
        if site.view is not None:
            ix = gidx(addr)
            act = LANES if m is None else np.flatnonzero(m)
            ix = ix if m is None else ix[m]
            if ((ix >= 0) & (ix < site.view.shape[0])).all():
                return [(site.view, act, ix)]
        return [(al.rows[key], l, x) for al, l, x in site.resolve(W, addr + U8(site.off & M64), m)]

    def run(W, addr, m, *vals):
        """Memory that changes counts as progress, for the endless-spin check."""
        W.yield_ = True
        places = lanes_of(W, addr, m) if m is None or m.any() else []
        before = [view[idx] for view, _, idx in places]
        out = apply(W, m, places, *vals)
        for b, (view, _, idx) in zip(before, places):
            if b.tobytes() != view[idx].tobytes():
                W.cta.launch.progress += 1
                break
        return out

    def apply(W, m, places, *vals):
        if m is not None and not m.any():
            return np.zeros(32 if n == 1 else (n, 32), dt)
        out = np.zeros((32, n) if n > 1 else 32, dt)
        if n > 1:
            val = np.stack(list(vals), 1)
            for view, lanes, idx in places:
                vk = view.view(kindv)
                vv = val.view(kindv)
                for l, x in zip(lanes.tolist(), idx.tolist()):
                    out[l] = view[x]
                    for c in range(vk.shape[1]):
                        vk[x, c] = fn(vk[x, c], vv[l, c], None)
            return out.T.copy()
        for view, lanes, idx in places:
            vk = view.view(kindv)
            a = vals[0].view(kindv) if vals else None
            packed = (kindv in (F2,) and w == 4) or site.packed
            if packed:
                e = w // vk.dtype.itemsize
                for l, x in zip(lanes.tolist(), idx.tolist()):
                    out[l] = view[x]
                    for c in range(e):
                        vk[x * e + c] = fn(vk[x * e + c], a[l * e + c], None)
                continue
            il = idx.tolist()
            uniq = len(set(il)) == len(il)
            if ufunc is not None and (uniq or not returns):
                if uniq:
                    old = vk[idx]
                    vk[idx] = ufunc(old, a[lanes])
                    out[lanes] = old.view(dt)
                else:
                    ufunc.at(vk, idx, a[lanes])
                continue
            b = vals[1].view(kindv) if len(vals) > 1 else None
            for l, x in zip(lanes.tolist(), il):
                o = vk[x]
                out[l] = view[x]
                vk[x] = fn(o, a[l], None if b is None else b[l])
        return out

    return run


def _inc(o, a, b):
    return type(o)(0) if o >= a else type(o)(int(o) + 1)


def _dec(o, a, b):
    return a if o == 0 or o > a else type(o)(int(o) - 1)


def _bfadd(o, a, b):
    return f2bf(bf2f(np.array([o], U2)) + bf2f(np.array([a], U2)))[0]


def _bfminmax(f):
    def g(o, a, b):
        return f2bf(f(bf2f(np.array([o], U2)), bf2f(np.array([a], U2))))[0]

    return g


ATOMS = {
    "add": (lambda o, a, b: o + a, np.add),
    "exch": (lambda o, a, b: a, None),
    "cas": (lambda o, a, b: b if o == a else o, None),
    "min": (lambda o, a, b: min(o, a), np.minimum),
    "max": (lambda o, a, b: max(o, a), np.maximum),
    "and": (lambda o, a, b: o & a, np.bitwise_and),
    "or": (lambda o, a, b: o | a, np.bitwise_or),
    "xor": (lambda o, a, b: o ^ a, np.bitwise_xor),
    "inc": (_inc, None),
    "dec": (_dec, None),
}
BF_ATOMS = {"add": _bfadd, "min": _bfminmax(np.fmin), "max": _bfminmax(np.fmax)}
