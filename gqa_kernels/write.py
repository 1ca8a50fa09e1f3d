"""Write tokens to slots of a cache's memory, wherever they are."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.dispatch import select
from .cache.base import KVCache
from .cache.tensors import to_int32
from .cache.view import KVView
from .call.append import AppendCall
from .native.arguments import check_tensors


def write(
    cache: KVCache, k_new: Tensor, v_new: Tensor, slot_mapping: Tensor, *, backend: str = "auto"
) -> None:
    """Write tokens to slots that the caller names, as engines do (vLLM's ``reshape_and_cache``);
    quantised if the cache is. Lengths do not change.

    Args:
        k_new: ``[total, Hk, D]``.
        v_new: ``[total, Hv, Dv]``.
        slot_mapping: ``[total]`` integers: slot ``s`` is slot ``s % page_size`` of page ``s //
            page_size`` (of a dense cache: of row ``s // capacity``). Tokens with a negative slot,
            or one beyond the memory, are dropped. No slot may come twice.
        backend: as in :func:`gqa_kernels.asym_gqa_attention`.

    Raises:
        ValueError, TypeError, NotImplementedError: as :meth:`KVCache.append`; nothing was written.

    Examples:
        >>> import torch
        >>> from gqa_kernels import PagedKVCache
        >>> pages = PagedKVCache.empty(num_pages=8, page_size=16, num_kv_heads=2, head_dim=64)
        >>> k, v = torch.randn(2, 3, 2, 64, dtype=torch.bfloat16)  # [total, H, D] each
        >>> pages.write(k, v, slot_mapping=torch.tensor([4, 50, -1]))  # -1 is dropped
    """
    check_tensors(k_new=k_new, v_new=v_new, slot_mapping=slot_mapping)
    memory = cache.unchecked_view()
    if slot_mapping.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"slot_mapping.dtype must be int32 or int64, got {slot_mapping.dtype}")
    for name, x in (("k_new", k_new), ("v_new", v_new)):
        if x.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions, got {x.dim()} {tuple(x.shape)}")
    if slot_mapping.shape != k_new.shape[:1] or slot_mapping.device != memory.device:
        raise ValueError(
            f"slot_mapping must have shape ({k_new.shape[0]},) on {memory.device}, one slot per "
            f"token, got {tuple(slot_mapping.shape)} on {slot_mapping.device}"
        )
    # Every token is a sequence of its own, without keys, that begins at its slot.
    page = to_int32(slot_mapping.div(memory.page_size, rounding_mode="floor"))
    begin = to_int32(slot_mapping % memory.page_size)
    heads = memory.num_k_heads
    view = KVView(
        memory.k, memory.v, torch.zeros_like(page)[:, None].expand(-1, heads),
        page[:, None, None].expand(-1, heads, 1), begin, memory.k_scale, memory.v_scale,
        memory.k_zero, memory.v_zero,
    )  # fmt: skip
    call = AppendCall(
        None, cache.stored_keys(k_new[:, :, None]), v_new[:, :, None], view, max_new=1
    )
    call.check()
    select(call, backend).append(call)
