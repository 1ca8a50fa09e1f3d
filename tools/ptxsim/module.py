"""A parsed PTX module with its kernels."""

import re
import struct
import time

import numpy as np

from .codegen import KernelCode
from .errors import PtxError
from .helpers import U1
from .launch import Launch, demangle, dim3
from .memory import GLOBAL_BASE, GUARD, Allocation, host_extent
from .parser import parse
from .syntax import TYPE_SIZES, Imm


class Module:
    """A loaded PTX module; module-scope variables keep their values between launches."""

    def __init__(self, text, name="module"):
        self.text, self.name = text, name
        self.ast = parse(text)
        self._codes = {}
        self._globals = {}
        self._alloc_globals()
        self.meta = {}

    # ------------------------------------------------------------ front ends
    @classmethod
    def from_ptx(cls, text, name="module"):
        """Load PTX text."""
        return cls(text, name)

    @classmethod
    def from_cuda(cls, path, arch="sm_80", include_dirs=(), defines=None, extra=()):
        """Compile a .cu file with nvcc and load it."""
        from .cuda import compile_cuda

        return cls(compile_cuda(path, arch, include_dirs, defines, extra), str(path))

    @classmethod
    def from_triton(
        cls,
        fn,
        signature,
        constexprs=None,
        num_warps=4,
        num_stages=3,
        arch=80,
        attrs=None,
        **options,
    ):
        """Compile a Triton kernel ahead of time (no GPU needed) and load it."""
        from .triton_front import TritonModule

        return TritonModule.compile(
            fn, signature, constexprs, num_warps, num_stages, arch, attrs, **options
        )

    # ------------------------------------------------------------ contents
    def kernels(self):
        """Names of the kernels, as written in the PTX."""
        return [f.name for f in self.ast.functions.values() if f.entry]

    def find(self, name):
        """The kernel with this exact name, or the only one whose C++ name starts with it."""
        ks = self.kernels()
        if name in ks:
            return name
        hits = []
        for k in ks:
            d = re.sub(r"^void ", "", demangle(k))
            short = d.split("(")[0]
            if short == name or short.split("<")[0].split("::")[-1] == name or d.startswith(name):
                hits.append(k)
        if len(hits) == 1:
            return hits[0]
        if not hits:
            raise PtxError(f"no kernel {name!r}; kernels: {[demangle(k) for k in ks]}")
        raise PtxError(f"{name!r} matches several kernels: {[demangle(k) for k in hits]}")

    def code(self, name):
        """The compiled :class:`KernelCode` of a kernel."""
        name = self.find(name)
        if name not in self._codes:
            self._codes[name] = KernelCode(self, self.ast.functions[name]).compile()
        return self._codes[name]

    def source_line(self, name):
        return demangle(name)

    # ------------------------------------------------------------ module variables
    def _alloc_globals(self):
        nxt = GLOBAL_BASE
        todo = []
        for v in self.ast.globals.values():
            if v.space not in ("global", "const") or (v.extern and v.size == 0):
                continue
            base = (nxt + max(v.align, 256) - 1) // max(v.align, 256) * max(v.align, 256)
            a = Allocation(base, v.size, v.name)
            nxt = base + v.size + GUARD
            self._globals[v.name] = a
            todo.append((v, a))
        self._next = nxt
        for v, a in todo:
            if v.init is not None:
                es = TYPE_SIZES[v.type]
                for k, x in enumerate(v.init):
                    if isinstance(x, Imm):
                        val = x.value & ((1 << (8 * es)) - 1)
                        if x.kind == "d" and v.type == "f32":
                            val = struct.unpack(
                                "<I",
                                struct.pack(
                                    "<f",
                                    struct.unpack("<d", struct.pack("<Q", x.value & (2**64 - 1)))[
                                        0
                                    ],
                                ),
                            )[0]
                    elif x[0] == "sym":
                        val = self._globals[x[1]].base + x[2] if x[1] in self._globals else 0
                    else:
                        sh = (x[1] & -x[1]).bit_length() - 1
                        val = (
                            (self._globals[x[2]].base & x[1]) >> sh if x[2] in self._globals else 0
                        )
                    a.buf[k * es : (k + 1) * es] = np.frombuffer(
                        int(val).to_bytes(es, "little"), U1
                    )

    def global_address(self, name):
        """Device address of a module-scope variable, or None."""
        a = self._globals.get(name)
        return a.base if a else None

    def variable(self, name):
        """Bytes of a module-scope variable, as a writable uint8 array."""
        if name not in self._globals:
            hits = [k for k in self._globals if demangle(k).split("::")[-1] == name]
            if len(hits) != 1:
                raise PtxError(f"no variable {name!r}: {sorted(self._globals)}")
            name = hits[0]
        a = self._globals[name]
        return a.buf[: a.size]

    # ------------------------------------------------------------ launch
    def launch(
        self,
        kernel,
        grid,
        block,
        args=(),
        smem_bytes=0,
        cluster=None,
        seed=0,
        check=True,
        coresident=False,
        schedule="random",
        quantum=32,
        metrics=True,
        procs=1,
        names=None,
        spin_limit=200000,
        timeout=None,
        poison=(),
    ):
        """Run a kernel and return a :class:`~ptxsim.metrics.LaunchReport`.

        Arrays in ``args`` are copied in and written back.  ``check`` is True, False or
        a set of "race", "uninit" (shared memory never written) and "async" (only reads of
        pending copies and forgotten waits, which any non-empty set includes).
        ``coresident`` runs all CTAs at once (for kernels whose CTAs wait for each other).
        ``procs`` > 1 spreads CTAs over processes when the kernel has no global atomics.
        ``timeout`` (seconds) ends a launch that runs too long with a report of where every
        warp stands. ``poison`` lists the numbers of array arguments to fill with 0xFF bytes
        (NaN) first, to expose unwritten outputs.
        """
        kc = self.code(kernel)
        L = Launch(
            self,
            kc,
            dim3(grid),
            dim3(block),
            args,
            smem_bytes,
            cluster,
            seed,
            check,
            metrics,
            quantum,
            spin_limit,
            procs > 1,
            names,
        )
        for k in poison:
            _, _, _lo, n = host_extent(args[k])
            a = L.mem.find(L.host.address(args[k]))
            o = L.host.offset(args[k])
            a.buf[o : o + n] = 0xFF
        L.deadline = time.monotonic() + timeout if timeout else None
        return L.run(coresident, schedule, procs)
