"""Make Triton's interpreter (``TRITON_INTERPRET=1``) numerically right: bf16, and fused FMA.

Up to version 3.9 the interpreter holds bf16 values as their raw 16 bits and computes on those as if
they were integers, and its casts to bf16 truncate. Here bf16 operands are widened to fp32 before
arithmetic and products, and results are rounded to nearest even, as devices do. ``tl.fma`` rounds
once instead of twice. With numpy 2.4 and later, loops whose bounds are run-time values fail for
lack of ``__index__``. That is patched too.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """Values of raw bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Raw bf16 bits of fp32 values, rounded to nearest even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


@lru_cache(maxsize=1)
def install() -> None:
    """Patch the interpreter of this process, once."""
    handle = triton_interpreter.TensorHandle
    builder = triton_interpreter.InterpreterBuilder
    stock_binary, stock_unary = builder.binary_op, builder.unary_op
    stock_dot, stock_fma = builder.create_dot, builder.create_fma
    stock_fp_to_fp = builder.create_fp_to_fp
    stock_patch_tensor = triton_interpreter._patch_lang_tensor

    def is_bf16(x) -> bool:
        return x.dtype.scalar == tl.bfloat16

    def widened(x):
        return handle(bf16_to_fp32(x.data), tl.float32) if is_bf16(x) else x

    def rounded(values: np.ndarray):
        return handle(fp32_to_bf16(values), tl.bfloat16)

    def binary_op(self, lhs, rhs, op):
        if not (is_bf16(lhs) or is_bf16(rhs)):
            return stock_binary(self, lhs, rhs, op)
        result = op(widened(lhs).data, widened(rhs).data)
        return handle(result, tl.int1) if result.dtype == bool else rounded(result)

    def unary_op(self, x, op):
        return rounded(op(widened(x).data)) if is_bf16(x) else stock_unary(self, x, op)

    def cast_impl(self, src, dst_type):
        src, dst = widened(src), dst_type.scalar
        if dst == tl.bfloat16:
            return rounded(src.data.astype(np.float32))
        return handle(src.data.astype(triton_interpreter._get_np_dtype(dst_type)), dst)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return stock_dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if {src.dtype.scalar, dst_type.scalar} <= {tl.float16, tl.bfloat16, tl.float32, tl.float64}:
            return cast_impl(self, src, dst_type)
        return stock_fp_to_fp(self, src, dst_type, rounding_mode)

    def create_fma(self, x, y, z):
        if x.dtype.scalar != tl.float32:
            return stock_fma(self, x, y, z)
        product = x.data.astype(np.float64) * y.data.astype(np.float64)
        return handle((product + z.data).astype(np.float32), tl.float32)

    def patch_tensor(tensor, *scope):
        stock_patch_tensor(tensor, *scope)

        def index(self) -> int:
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        if scope:  # newer versions restore the attributes they set
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.create_dot, builder.create_fma = create_dot, create_fma
    triton_interpreter._patch_lang_tensor = patch_tensor
