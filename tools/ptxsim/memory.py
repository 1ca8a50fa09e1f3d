"""Fake 64-bit address space: allocations with guard gaps, and host argument marshalling.

Address map (generic addresses)::

    GLOBAL_BASE ..   one region per allocation, separated by guard gaps
    SHARED_WIN  ..   shared window: SHARED_WIN + (cta rank << 24) + offset
    LOCAL_WIN   ..   per-thread local memory: LOCAL_WIN + offset
    PARAM_WIN   ..   kernel parameter bank
"""

import bisect
import ctypes
import mmap

import numpy as np

from .errors import PtxError

GLOBAL_BASE = 0x7F00_0000_0000
SHARED_WIN = 0x0001_0000_0000_0000
LOCAL_WIN = 0x0002_0000_0000_0000
PARAM_WIN = 0x0003_0000_0000_0000
WIN_SIZE = 1 << 40
SHARED_ORIGIN = 1024  # first usable shared offset, so that null is never valid
GUARD = 1 << 20

_dt = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def typed_views(buf, size):
    """Views of a byte buffer as items of 1..32 bytes: {width: array or (n, k) array}."""
    v = {1: buf[:size]}
    for w in (2, 4, 8):
        v[w] = buf[: size // w * w].view(_dt[w])
    return v


class Rows:
    """Lazily made views ``rows[elem_width, count]`` with one row per aligned vector."""

    def __init__(self, buf, size):
        self.buf, self.size, self.cache = buf, size, {}

    def __getitem__(self, key):
        v = self.cache.get(key)
        if v is None:
            w, n = key
            t = w * n
            a = self.buf[: self.size // t * t].view(_dt[w])
            v = self.cache[key] = a if n == 1 else a.reshape(-1, n)
        return v


class Allocation:
    """A contiguous device region backed by a byte array."""

    def __init__(self, base, size, name, shared=False):
        self.base, self.size, self.name = base, size, name
        pad = (size + 63) // 32 * 32
        if shared:
            self.map = mmap.mmap(-1, max(pad, 1))
            self.buf = np.frombuffer(self.map, dtype=np.uint8)
        else:
            self.buf = np.zeros(pad, np.uint8)
        self.rows = Rows(self.buf, size)
        self.base32 = np.full(32, base, np.uint64)
        self.touched_r = self.touched_w = None

    def share_touched(self):
        """Create both flag arrays in memory shared with forked workers."""
        for name in ("touched_r", "touched_w"):
            m = mmap.mmap(-1, max(self.buf.size, 1))
            setattr(self, name, Rows(np.frombuffer(m, np.uint8), self.size))

    def touched(self, write):
        """Byte flags of what was touched (created on first use)."""
        name = "touched_w" if write else "touched_r"
        t = getattr(self, name)
        if t is None:
            b = np.zeros(self.buf.size, np.uint8)
            t = Rows(b, self.size)
            setattr(self, name, t)
        return t


class Memory:
    """All global allocations of one launch."""

    def __init__(self, shared=False):
        self.shared = shared
        self.next = GLOBAL_BASE
        self.bases, self.allocs = [], []

    def alloc(self, size, name, align=256, phase=0):
        """Allocate ``size`` bytes; the address is ``phase`` modulo ``align`` (>= 256)."""
        align = max(align, 256)
        base = (self.next + align - 1) // align * align + phase % align
        a = Allocation(base, size, name, self.shared)
        self.next = base + size + GUARD
        self.bases.append(base)
        self.allocs.append(a)
        return a

    def find(self, addr):
        """The allocation holding ``addr``, or None."""
        i = bisect.bisect_right(self.bases, addr) - 1
        if i >= 0:
            a = self.allocs[i]
            if addr < a.base + a.size:
                return a
        return None

    def describe(self, addr):
        """A human description of an address for error messages."""
        if SHARED_WIN <= addr < SHARED_WIN + WIN_SIZE:
            return f"shared window offset {addr - SHARED_WIN:#x}"
        if LOCAL_WIN <= addr < LOCAL_WIN + WIN_SIZE:
            return f"local window offset {addr - LOCAL_WIN:#x}"
        if PARAM_WIN <= addr < PARAM_WIN + WIN_SIZE:
            return f"parameter window offset {addr - PARAM_WIN:#x}"
        best = None
        for a in self.allocs:
            d = addr - (a.base + a.size) if addr >= a.base + a.size else max(a.base - addr, 0)
            if best is None or d < best[0]:
                best = (d, a)
        if best is None:
            return "no allocation exists"
        d, a = best
        if addr < a.base:
            return f"{a.base - addr} bytes before {a.name} ({a.size} bytes)"
        if addr >= a.base + a.size:
            return f"{addr - a.base - a.size} bytes past the end of {a.name} ({a.size} bytes)"
        return f"offset {addr - a.base} in {a.name} ({a.size} bytes)"

    def read(self, addr, n):
        """``n`` bytes at a global address, as a uint8 array view."""
        a = self.find(addr)
        if a is None or addr + n > a.base + a.size:
            raise PtxError(f"host read of {n} bytes at {addr:#x}: {self.describe(addr)}")
        o = addr - a.base
        return a.buf[o : o + n]

    def cstring(self, addr):
        """The NUL-terminated string at ``addr``."""
        a = self.find(addr)
        if a is None:
            return "<bad string>"
        o = addr - a.base
        raw = a.buf[o : a.size].tobytes()
        return raw.split(b"\0")[0].decode("latin-1")


# ---------------------------------------------------------------- host arrays
def is_torch(x):
    """True for torch tensors, without importing torch."""
    return type(x).__module__.split(".")[0] == "torch" and hasattr(x, "data_ptr")


def host_extent(x):
    """(root key, root address, low address, byte length) of an array or tensor."""
    if is_torch(x):
        if x.device.type != "cpu":
            raise PtxError("tensor arguments must be on the CPU")
        root = x.untyped_storage().data_ptr()
        lo = x.data_ptr()
        es = x.element_size()
        if x.numel() == 0:
            return root, root, lo, 0
        hi = lo + es + es * sum((s - 1) * st for s, st in zip(x.shape, x.stride()))
        return root, root, lo, hi - lo
    r = x
    while isinstance(r.base, np.ndarray):
        r = r.base
    root = r.__array_interface__["data"][0]
    lo = x.__array_interface__["data"][0]
    if x.size == 0:
        return root, root, lo, 0
    low = lo + sum((s - 1) * st for s, st in zip(x.shape, x.strides) if st < 0)
    high = lo + x.itemsize + sum((s - 1) * st for s, st in zip(x.shape, x.strides) if st > 0)
    return root, root, low, high - low


def host_bytes(addr, n):
    """A writable uint8 view of host memory."""
    if n == 0:
        return np.zeros(0, np.uint8)
    return np.frombuffer((ctypes.c_char * n).from_address(addr), np.uint8)


class HostBuffers:
    """Maps host arrays to device allocations; overlapping extents share one allocation."""

    def __init__(self, mem):
        self.mem = mem
        self.pending = []  # (array, name)
        self.items = []  # (lo, n, alloc)
        self.keep = []

    def add(self, x, name):
        """Register an array before :meth:`commit`."""
        root, root_addr, lo, n = host_extent(x)
        self.pending.append((root, root_addr, lo, n, name))
        self.keep.append(x)

    def commit(self):
        """Merge overlapping extents, allocate, and copy the data in."""
        self.pending.sort(key=lambda p: (p[0], p[2], -p[3]))
        cur = None
        groups = []
        for root, ra, lo, n, name in self.pending:
            if cur and cur[0] == root and lo < cur[2] + cur[3] and n:
                end = max(cur[2] + cur[3], lo + n)
                cur[3] = end - cur[2]
                if name not in cur[4].split("/"):
                    cur[4] += "/" + name
            elif cur and cur[0] == root and lo == cur[2] and n == cur[3]:
                pass
            else:
                cur = [root, ra, lo, n, name]
                groups.append(cur)
        for _, ra, lo, n, name in groups:
            a = self.mem.alloc(n, name, 256, (lo - ra) % 256)
            a.buf[:n] = host_bytes(lo, n)
            self.items.append((lo, n, a))

    def address(self, x):
        """Device address of a registered array."""
        if is_torch(x):
            p = x.data_ptr()
        else:
            p = x.__array_interface__["data"][0]
        _, _, lo, n = host_extent(x)
        for l, m, a in self.items:
            if l <= lo and lo + n <= l + m:
                return a.base + (p - l)
        raise PtxError("array was not registered")

    def offset(self, x):
        """Byte offset of a registered array's lowest byte in its allocation."""
        _, _, lo, n = host_extent(x)
        return next(lo - l for l, m, a in self.items if l <= lo and lo + n <= l + m)

    def write_back(self):
        """Copy device data back to the host arrays."""
        for lo, n, a in self.items:
            dst = host_bytes(lo, n)
            src = a.buf[:n]
            if n and not np.array_equal(dst, src):
                dst[:] = src
