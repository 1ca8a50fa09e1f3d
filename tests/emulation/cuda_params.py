"""The structs that the CUDA kernels' host code takes, for ctypes, with addresses of CPU tensors."""

from __future__ import annotations

import ctypes

import torch

POINTER = ctypes.c_void_p


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("b", "h", "s")]


def _fields(kind, names: str) -> list[tuple[str, object]]:
    return [(name, kind) for name in names.split()]


class AttentionParams(ctypes.Structure):
    """``gqa::AttentionParams`` (csrc/core/params.h), with addresses of CPU tensors."""

    _fields_ = [
        *_fields(POINTER, "q k v out lse"),
        *_fields(Strides, "q_stride k_stride v_stride out_stride"),
        *_fields(POINTER, "head_map value_head_map alibi_slopes"),
        *_fields(ctypes.c_int64, "alibi_stride_b alibi_stride_h"),
        *_fields(POINTER, "sinks attn_mask"),
        *_fields(ctypes.c_int64, "mask_stride_b mask_stride_h mask_stride_q mask_stride_k"),
        *_fields(POINTER, "kv_lengths"),
        *_fields(ctypes.c_int64, "kv_lengths_stride_b kv_lengths_stride_h"),
        *_fields(ctypes.c_int64, "batch num_heads num_k_heads num_v_heads"),
        *_fields(ctypes.c_int64, "q_len kv_len head_dim value_head_dim"),
        *_fields(ctypes.c_float, "scale softcap"),
        *_fields(ctypes.c_int64, "window_left window_right"),
        *_fields(ctypes.c_int32, "dtype mask_dtype"),
        *_fields(POINTER, "page_table"),
        *_fields(ctypes.c_int64, "page_table_stride_b page_table_stride_h page_table_stride_p"),
        *_fields(ctypes.c_int64, "num_pages page_size max_pages"),
        *_fields(POINTER, "kv_begin q_offsets"),
        *_fields(ctypes.c_int64, "q_tokens"),
        *_fields(ctypes.c_int32, "k_dtype v_dtype"),
        *_fields(POINTER, "k_scale v_scale k_zero v_zero"),
        *_fields(Strides, "k_scale_stride v_scale_stride k_zero_stride v_zero_stride"),
        *_fields(ctypes.c_uint32, "dropout_threshold"),
        *_fields(ctypes.c_float, "dropout_scale"),
        *_fields(POINTER, "dropout_seed"),
    ]


class BackwardParams(ctypes.Structure):
    """``gqa::BackwardParams`` (csrc/core/backward_params.h)."""

    _fields_ = [
        ("call", AttentionParams),
        ("max_kv_len", ctypes.c_int64),
        *_fields(POINTER, "dout dlse dq dk dv"),
        *_fields(Strides, "dout_stride dq_stride dk_stride dv_stride"),
        *_fields(POINTER, "dslopes dsinks"),
    ]


class AppendParams(ctypes.Structure):
    """``gqa::AppendParams`` (csrc/core/append_params.h)."""

    _fields_ = [
        ("cache", AttentionParams),
        *_fields(POINTER, "k v k_scale v_scale k_zero v_zero"),
        *_fields(ctypes.c_bool, "k_dynamic v_dynamic"),
        *_fields(POINTER, "q q_rotated k_new v_new"),
        *_fields(Strides, "q_stride q_rotated_stride k_new_stride v_new_stride"),
        *_fields(POINTER, "new_offsets"),
        *_fields(ctypes.c_int64, "num_tokens"),
        *_fields(ctypes.c_int32, "dtype"),
        *_fields(POINTER, "rotary_cos rotary_sin"),
        *_fields(ctypes.c_int64, "cos_stride sin_stride rotary_positions rotary_dim"),
        *_fields(ctypes.c_int32, "cos_dtype sin_dtype"),
        *_fields(ctypes.c_bool, "rotary_interleaved"),
    ]


class KeptSide(ctypes.Structure):
    """``gqa::KeptSide`` (csrc/core/keep_params.h)."""

    _fields_ = [*_fields(POINTER, "data scale zero"),
                *_fields(ctypes.c_int64, "row_bytes element_bytes")]  # fmt: skip


class KeepParams(ctypes.Structure):
    """``gqa::KeepParams`` (csrc/core/keep_params.h)."""

    _fields_ = [
        ("cache", AttentionParams),
        *_fields(KeptSide, "k v"),
        *_fields(POINTER, "indices"),
        *_fields(ctypes.c_int64, "index_stride_b index_stride_h index_stride_n num_indices"),
        *_fields(POINTER, "counts"),
        *_fields(ctypes.c_int64, "count_stride_b count_stride_h"),
    ]


# Of phases that are not listed: AttentionParams.
PARAMS = {"backward": BackwardParams, "append": AppendParams, "keep": KeepParams}
DTYPES = (  # in the order of gqa::DType
    torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int8, torch.uint8,
)  # fmt: skip
