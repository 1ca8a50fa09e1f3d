"""Triton front end: compile a kernel ahead of time to PTX, without a GPU or driver."""

import numpy as np

from .errors import PtxError
from .module import Module


class TritonModule(Module):
    """A compiled Triton kernel: adds its launch metadata to the module.

    ``launch(grid, args)`` takes the kernel's runtime arguments in order (or a dict); the
    block size, shared memory and the trailing scratch pointers are filled in.
    """

    @classmethod
    def compile(
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
        """``signature`` maps argument names to Triton types, e.g. ``{"x": "*fp32", "n": "i32"}``.

        ``constexprs`` gives the values of ``tl.constexpr`` arguments.  ``attrs`` maps pointer or
        integer argument names to the power of two that divides them (default 16 for pointers).
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.runtime.jit import JITFunction

        constexprs = dict(constexprs or {})
        while not isinstance(fn, JITFunction) and hasattr(fn, "fn"):
            fn = fn.fn  # autotune and heuristics wrappers
        names = fn.arg_names
        sig = {}
        for n in names:
            if n in constexprs:
                sig[n] = "constexpr"
            elif n in signature:
                sig[n] = signature[n]
            else:
                raise PtxError(f"no type or constexpr value for argument {n}")
        at = {}
        for k, n in enumerate(names):
            div = (attrs or {}).get(n, 16 if str(sig[n]).startswith("*") else None)
            if div:
                at[(k,)] = [["tt.divisibility", div]]
        src = ASTSource(
            fn=fn,
            signature=sig,
            constexprs={(names.index(k),): v for k, v in constexprs.items()},
            attrs=at,
        )
        num = int(str(arch).replace("sm_", "").replace("a", ""))
        ck = triton.compile(
            src,
            target=GPUTarget("cuda", num, 32),
            options=dict(num_warps=num_warps, num_stages=num_stages, **options),
        )
        m = cls.from_compiled(ck, [n for n in names if sig[n] != "constexpr"])
        m.signature = sig
        return m

    @classmethod
    def from_compiled(cls, compiled, runtime_args):
        """A kernel that ``triton.compile`` made.

        ``runtime_args`` names its parameters in order; a tuple argument has one for each member
        that is not known at compile time.
        """
        m = cls(compiled.asm["ptx"], compiled.metadata.name)
        m.metadata = compiled.metadata
        m.kernel_name = compiled.metadata.name
        m.runtime_args = list(runtime_args)
        m.signature = {}
        m.asm = compiled.asm
        return m

    def launch(self, grid, args, block=None, **kw):
        """Run the kernel over ``grid``; see :meth:`Module.launch` for the options."""
        if isinstance(grid, str):  # Module.launch calling convention
            return Module.launch(self, grid, args, block, **kw)
        if isinstance(args, dict):
            args = [args[n] for n in self.runtime_args]
        md = self.metadata
        args = list(args)
        flat, names = [], []
        for n, a in zip(self.runtime_args, args):
            if hasattr(a, "block_shape") and hasattr(a, "base"):
                parts = self._descriptor(n, a)
                flat += parts
                names += [f"{n}.{i}" for i in range(len(parts))]
            else:
                flat.append(a)
                names.append(n)
        params = self.ast.functions[self.kernel_name].params
        nctas = int(np.prod(grid)) if not isinstance(grid, int) else grid
        extra = len(params) - len(flat)
        for k in range(extra):
            size = 0
            if k == 0 and extra >= 1:
                size = getattr(md, "global_scratch_size", 0) * nctas
            flat.append(np.zeros(size + 256, np.uint8) if size else None)
            names.append(f"scratch {k}")
        warps = getattr(md, "num_warps", 4)
        attrs = self.ast.functions[self.kernel_name].attrs
        req = attrs.get("reqntid") or attrs.get("maxntid")
        threads = req[0] if isinstance(req, list) else 32 * warps
        cd = getattr(md, "cluster_dims", None) or (1, 1, 1)
        if getattr(md, "num_ctas", 1) == 1:
            cd = (1, 1, 1)
        return Module.launch(
            self,
            self.kernel_name,
            grid,
            threads,
            flat,
            smem_bytes=md.shared,
            cluster=tuple(cd),
            names=names,
            **kw,
        )

    def _descriptor(self, name, d):
        """Expand a host TensorDescriptor into the kernel's parameters."""
        from .tma import TensorMap

        meta = getattr(self.metadata, "tensordesc_meta", None)
        shape, strides = list(d.shape), list(d.strides)
        out = []
        if meta:
            idx = [n for n in self.runtime_args if str(self.signature[n]).startswith("tensordesc")]
            mt = meta[idx.index(name)]
            es = d.base.element_size() if hasattr(d.base, "element_size") else d.base.itemsize
            sw = {0: "none", 1: "32B", 2: "64B", 3: "128B"}[mt["swizzle"]]
            box = list(mt["block_size"])
            out.append(
                TensorMap(d.base, box, swizzle=sw, shape=shape, strides=[s * es for s in strides])
            )
        else:
            out.append(d.base)
            out += [np.int64(x) for x in shape] + [np.int64(x) for x in strides]
            out.append(np.uint8(getattr(d, "padding", "zero") == "nan"))
        return out + [np.int32(x) for x in shape] + [np.int64(x) for x in strides]
