"""TensorMap: a stand-in for cuTensorMapEncodeTiled, and tile transfers."""

import struct

import numpy as np

from .errors import MemoryFault, PtxError
from .floats import bf2f, f2bf
from .helpers import U1, lanes_of
from .memory import SHARED_ORIGIN, is_torch

MAGIC = 0x50A7
SWIZZLES = {"none": 0, None: 0, 0: 0, "32B": 32, 32: 32, "64B": 64, 64: 64, "128B": 128, 128: 128}


class TensorMap:
    """Describes a tiled tensor for ``cp.async.bulk.tensor``.

    ``array``            numpy array or CPU torch tensor, dims given outermost first as usual
    ``box``              tile shape, outermost first, one entry per array dimension
    ``element_strides``  traversal strides, outermost first (default all 1)
    ``swizzle``          "none", "32B", "64B" or "128B"
    ``oob_fill``         "zero" or "nan"
    The innermost dimension must be contiguous.  ``interleave`` must be "none".
    """

    def __init__(
        self,
        array,
        box,
        element_strides=None,
        swizzle="none",
        interleave="none",
        oob_fill="zero",
        shape=None,
        strides=None,
        l2_promotion=None,
    ):
        if interleave not in ("none", None, 0):
            raise PtxError("only interleave='none' is modelled", "unsupported")
        self.array = array
        shp = tuple(shape if shape is not None else array.shape)
        if is_torch(array):
            es = array.element_size()
            st = strides if strides is not None else [s * es for s in array.stride()]
        else:
            es = array.itemsize
            st = strides if strides is not None else array.strides
        st = list(st)
        if len(shp) != len(box) or not 1 <= len(shp) <= 5:
            raise PtxError("box must have one entry per dimension (1 to 5)")
        if st[-1] != es:
            raise PtxError("the innermost dimension must be contiguous")
        for s, _d in zip(st[:-1], shp):
            if s % 16:
                raise PtxError(f"global strides must be multiples of 16 bytes, got {s}")
        self.es = es
        self.dims = list(reversed(shp))
        self.strides = list(reversed(st[:-1]))
        self.box = list(reversed(box))
        self.estr = list(reversed(element_strides)) if element_strides else [1] * len(shp)
        self.swizzle = SWIZZLES[swizzle]
        self.nan_fill = oob_fill == "nan"
        if any(not 1 <= b <= 256 for b in self.box):
            raise PtxError("box dimensions must be in 1..256")
        if self.box[0] * es % 16:
            raise PtxError("inner box size must be a multiple of 16 bytes")
        if self.swizzle and self.box[0] * es > self.swizzle:
            raise PtxError(
                f"inner box of {self.box[0] * es} bytes exceeds the "
                f"{self.swizzle}-byte swizzle span"
            )

    def encode(self, address):
        """The 128-byte descriptor (this emulator's own layout)."""
        return pack(
            address,
            self.es,
            self.dims,
            self.strides,
            self.box,
            self.estr,
            self.swizzle,
            self.nan_fill,
        )


def pack(address, es, dims, strides, box, estr, swizzle, nan_fill):
    n = len(dims)
    d = list(dims) + [0] * (5 - n)
    s = list(strides) + [0] * (4 - len(strides))
    b = list(box) + [0] * (5 - n)
    e = list(estr) + [0] * (5 - n)
    raw = struct.pack(
        "<HBBBB2xQ5I4Q5H5B", MAGIC, n, es, swizzle // 32, int(nan_fill), address, *d, *s, *b, *e
    )
    return raw + b"\0" * (128 - len(raw))


class Decoded:
    """A descriptor read back from device memory."""

    def __init__(self, raw, where=""):
        f = struct.unpack_from("<HBBBB2xQ5I4Q5H5B", raw)
        if f[0] != MAGIC:
            raise MemoryFault(f"not a valid tensor map at {where}", "tensormap")
        n = self.n = f[1]
        self.es, self.swizzle, self.nan_fill, self.addr = f[2], f[3] * 32, bool(f[4]), f[5]
        self.dims = f[6 : 6 + n]
        self.strides = (self.es, *f[11 : 11 + n - 1])
        self.box = f[15 : 15 + n]
        self.estr = tuple(max(1, x) for x in f[20 : 20 + n])
        self.count = tuple(-(-b // e) for b, e in zip(self.box, self.estr))
        self.bytes = int(np.prod(self.count)) * self.es


_dt = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _window(mem, d, coords, where):
    """In-bounds part of a tile: (strided view of global memory, destination slices)."""
    lo, hi = [], []
    for c, n, dim, e in zip(coords, d.count, d.dims, d.estr):
        first = 0 if c >= 0 else (-c + e - 1) // e
        last = min(n, (dim - c + e - 1) // e) if c < dim else 0
        lo.append(first)
        hi.append(max(first, last))
    if any(h <= l for l, h in zip(lo, hi)):
        return None, None
    addr = d.addr + sum((c + l * e) * s for c, l, e, s in zip(coords, lo, d.estr, d.strides))
    shape = [h - l for l, h in zip(lo, hi)]
    st = [s * e for s, e in zip(d.strides, d.estr)]
    end = addr + sum((n - 1) * s for n, s in zip(shape, st)) + d.es
    al = mem.find(addr)
    if al is None or end > al.base + al.size:
        raise MemoryFault(
            f"TMA access outside its allocation ({mem.describe(addr)}, "
            f"{end - addr} bytes) at {where}",
            "out-of-bounds",
        )
    o = addr - al.base
    v = np.lib.stride_tricks.as_strided(
        al.buf[o : o + d.es].view(_dt[d.es]) if o % d.es == 0 else None, shape[::-1], st[::-1]
    )
    sl = tuple(slice(l, h) for l, h in zip(lo, hi))[::-1]
    return v, sl, al, o, end - addr


def read_tile(mem, d, coords, where):
    """The tile as bytes in box order, out-of-bounds elements filled."""
    t = np.zeros(d.count[::-1], _dt[d.es])
    if d.nan_fill:
        t[...] = {2: 0x7FFF, 4: 0x7FFFFFFF}.get(d.es, 0)
    w = _window(mem, d, coords, where)
    if w[0] is not None:
        t[w[1]] = w[0]
        _touch(w[2], w[3], w[0], False)
    return t.reshape(-1).view(np.uint8)


def write_tile(mem, d, coords, data, where, red=None, red_type=None):
    """Store (or reduce) a tile of bytes in box order."""
    t = data.view(_dt[d.es]).reshape(d.count[::-1])
    w = _window(mem, d, coords, where)
    if w[0] is None:
        return
    src = t[w[1]]
    _touch(w[2], w[3], w[0], True)
    if red is None:
        w[0][...] = src
    else:
        w[0][...] = reduce_values(w[0], src, red, red_type)


def _touch(al, o, view, write):
    t = al.touched(write)
    f = np.lib.stride_tricks.as_strided(
        t.buf[o : o + view.itemsize].view(view.dtype), view.shape, view.strides
    )
    f[...] = {1: 1, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}[view.itemsize]


def reduce_values(old, new, what, ty):
    """Element-wise reduction on raw bits; ``ty`` is a PTX type or None (guess by size)."""

    es = old.dtype.itemsize
    if ty is None:
        ty = {2: "bf16", 4: "f32", 8: "f64"}[es]
    f = {
        "add": np.add,
        "min": np.fmin,
        "max": np.fmax,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[what]
    if ty == "bf16":
        return f2bf(f(bf2f(np.ascontiguousarray(old)), bf2f(np.ascontiguousarray(new))))
    k = {
        "f16": np.float16,
        "f32": np.float32,
        "f64": np.float64,
        "u32": np.uint32,
        "s32": np.int32,
        "u64": np.uint64,
        "s64": np.int64,
        "b32": np.uint32,
        "b64": np.uint64,
    }[ty]
    a, b = np.ascontiguousarray(old).view(k), np.ascontiguousarray(new).view(k)
    return f(a, b).astype(k).view(old.dtype)


def tensormap_replace(W, m, field, addr, space, index, value, where):
    """Edit one field of a descriptor held in shared or global memory."""
    for l in lanes_of(m):
        a = int(addr[l])
        if space == "shared":
            o = (a & 0xFFFFFF) - SHARED_ORIGIN
            raw = W.cta.smem[o : o + 128]
            W.cta.valid_bytes[o : o + 128] = 1
        else:
            raw = W.cta.launch.mem.read(a, 128)
        b = bytearray(raw.tobytes())
        v = int(value[l])
        struct.pack_into("<H", b, 0, MAGIC)
        i = index or 0
        if field == "global_address":
            struct.pack_into("<Q", b, 8, v)
        elif field == "rank":
            b[2] = v + 1
        elif field == "box_dim":
            struct.pack_into("<H", b, 68 + 2 * i, v & 0xFFFF)
        elif field == "global_dim":
            struct.pack_into("<I", b, 16 + 4 * i, v & 0xFFFFFFFF)
        elif field == "global_stride":
            struct.pack_into("<Q", b, 36 + 8 * i, v)
        elif field == "element_stride":
            b[78 + i] = v & 0xFF
        elif field == "elemtype":
            b[3] = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2}.get(v, 4)
        elif field == "swizzle_mode":
            b[4] = {0: 0, 1: 1, 2: 2, 3: 4}[v]
        elif field == "fill_mode":
            b[5] = v
        elif field == "interleave_layout" and v:
            raise PtxError(f"interleaved tensor map at {where}", "unsupported")
        raw[:] = np.frombuffer(bytes(b), U1)


def tensormap_copy(W, gaddr, saddr, n):
    """tensormap.cp_fenceproxy: shared -> global copy of a descriptor."""
    o = (int(saddr) & 0xFFFFFF) - SHARED_ORIGIN
    W.cta.launch.mem.read(int(gaddr), n)[:] = W.cta.smem[o : o + n]
