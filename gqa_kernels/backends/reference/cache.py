"""The reference over a KV view: gather the keys and values, dequantise them, then attend eagerly.

This is the definition of attention over caches, of the append and of keep for every other backend.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ...cache.formats import dequantize, quantize, row_scales
from ...cache.view import KVView, is_dynamic
from ...call.append import AppendCall
from ...call.attention import AttentionCall
from ...call.keep import KeepCall
from ...call.rotary import rotate
from ...native import schema
from ...native.dropout import keep_mask
from .formula import reference_attention, visibility


def reference_cache_attention(
    call: AttentionCall, matmul_dtype: torch.dtype | None = None, base2: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention over a view; arguments as for :func:`reference_attention`.

    Returns:
        out ``[B, Hq, Sq, Dv]`` in q's dtype and LSE ``[B, Hq, Sq]``; with ``q_offsets`` both have
        ``[1, Hq, total_q]`` in front, 0 and -inf at tokens of no sequence.
    """
    dense, unreadable = dense_call(call)
    out, lse = reference_attention(dense, matmul_dtype, base2, _kept(call))
    index = dense.head_map_tensor.long().clamp(0, call.num_k_heads - 1)
    _, visible = visibility(dense, index)
    lost = (visible & unreadable[:, index, None]).any(-1)
    out, lse = out.masked_fill(lost[..., None], math.nan), lse.masked_fill(lost, math.nan)
    if call.q_offsets is None:
        return out, lse
    # Right-aligned slots without a token write to one token more, which is cut off.
    token, valid = query_tokens(call)
    total = call.q.shape[2]
    token = torch.where(valid, token, total).flatten()
    packed_out = out.new_zeros(1, call.num_heads, total + 1, out.shape[3])
    packed_lse = lse.new_full((1, call.num_heads, total + 1), -math.inf)
    packed_out = packed_out.index_copy(2, token, out.transpose(0, 1).flatten(1, 2)[None])
    packed_lse = packed_lse.index_copy(2, token, lse.transpose(0, 1).flatten(1, 2)[None])
    return packed_out[:, :, :-1], packed_lse[:, :, :-1]


def dense_call(call: AttentionCall) -> tuple[AttentionCall, Tensor]:
    """The same call on gathered, dequantised K and V, and which keys have a page out of range,
    ``[B, Hk, capacity]``.

    K and V of a quantised cache are fp32 there, exact. Packed queries become ``[B, Hq, max_q_len,
    D]`` aligned to the right, so that the last token of each sequence stays the last.
    """
    k, v, unreadable = gather(call.kv)
    q, mask, ranges = call.q, call.attn_mask, call.key_ranges
    if call.q_offsets is not None:
        token, valid = query_tokens(call)
        if mask is not None:
            mask = torch.nn.functional.pad(
                _aligned_right(mask, call), (0, call.kv_len - mask.shape[3])
            )
        if ranges is not None:
            ranges = _aligned_right(ranges, call)
        q = torch.cat([q, q.new_zeros(1, q.shape[1], 1, q.shape[3])], dim=2)  # of no token
        q = q[0][:, torch.where(valid, token, q.shape[2] - 1)].transpose(0, 1)
    view = KVView(k, v, _lengths(call.kv).to(torch.int32))
    dense = replace(
        call, q=q, kv=view, memory="dense", bshd=False, q_offsets=None, attn_mask=mask,
        key_ranges=ranges,
    )  # fmt: skip
    return dense, unreadable


def _kept(call: AttentionCall) -> Tensor | None:
    """Which probabilities dropout keeps in the dense call: its queries are counted in their
    sequence, not in their slots."""
    if call.dropout_seed is None or call.q_offsets is None:
        return None
    shape = (call.batch, call.num_heads, call.max_q_len, call.kv_len)
    return _aligned_right(keep_mask(call.dropout_seed, call.options.dropout_p, *shape), call)


def _aligned_right(rows: Tensor, call: AttentionCall) -> Tensor:
    """``[B, Hq, max_q_len, n]`` in which a query's row is its number in its sequence, with rows as
    the queries' slots."""
    assert call.q_offsets is not None  # the queries are packed
    counts = call.q_offsets.long().diff()
    number = torch.arange(call.max_q_len, device=call.device) - (call.max_q_len - counts)[:, None]
    return rows.gather(2, number.clamp(min=0)[:, None, :, None].expand(rows.shape))


def gather(view: KVView) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of a view as dense tensors, 0 beyond a sequence's length.

    Returns:
        k ``[B, Hk, capacity, D]`` and v ``[B, Hv, capacity, Dv]``, in fp32 where the cache is
        quantised, and which keys have a page out of range, bool ``[B, Hk, capacity]``.
    """
    j = torch.arange(view.capacity, device=view.device)
    page, slot, unreadable = _places(view, j.expand(view.batch, 1, view.capacity))
    in_use = j < _lengths(view)[..., None]
    unreadable = unreadable & in_use
    usable = in_use & ~unreadable
    head = torch.arange(view.num_k_heads, device=view.device)[:, None]
    page, slot = torch.where(usable, page, 0), torch.where(usable, slot, 0)
    k = _rows(view.k, view.k_scale, view.k_zero, page, head, slot)
    k = k.masked_fill(~usable[..., None], 0)
    if view.num_v_heads != view.num_k_heads or not view.pages_per_head:
        # Value heads that other query heads read than the key head of that number: all heads share
        # their pages, and lengths are of key heads.
        usable = usable.any(1, keepdim=True)
        page, slot, usable = (
            x.amax(1, keepdim=True).expand(-1, view.num_v_heads, -1) for x in (page, slot, usable)
        )
        head = torch.arange(view.num_v_heads, device=view.device)[:, None]
    v = _rows(view.v, view.v_scale, view.v_zero, page, head, slot)
    return k, v.masked_fill(~usable[..., None], 0), unreadable


def _lengths(view: KVView) -> Tensor:
    """Valid keys ``[B, Hk]``, clamped to what the view can hold."""
    assert view.kv_lengths is not None  # every cache has them
    begin = 0 if view.kv_begin is None else view.kv_begin.long()[:, None]
    return torch.minimum(view.kv_lengths.long(), view.capacity - torch.as_tensor(begin)).clamp(
        min=0
    )


def _places(view: KVView, j: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(page, slot in it, page is out of range) of keys ``j [B, 1 or Hk, n]``, each
    ``[B, Hk, n]``."""
    if view.kv_begin is not None:
        j = j + view.kv_begin.long()[:, None, None]
    j = j.expand(-1, view.num_k_heads, -1)
    entry = (j // view.page_size).clamp(0, view.max_pages - 1)
    if view.page_table is None:
        # Packed sequences share one row of storage.
        row = torch.arange(view.batch, device=view.device).clamp(max=view.num_pages - 1)
        page = row[:, None, None].expand_as(j)
    else:
        page = view.page_table.long().gather(2, entry)
    outside = (page < 0) | (page >= view.num_pages)
    return torch.where(outside, 0, page), j % view.page_size, outside


def _rows(
    storage: Tensor, scale: Tensor | None, zero: Tensor | None, page: Tensor, head: Tensor,
    slot: Tensor,
) -> Tensor:  # fmt: skip
    """Rows of the storage ``[B, H, n, D]``, dequantised where it is quantised."""
    if scale is None:
        return storage[page, head, slot]
    # Not every device indexes fp8, so its bytes are taken.
    stored = storage.view(torch.uint8)[page, head, slot].view(storage.dtype)
    zero = None if zero is None else zero[page, head, slot]
    return dequantize(stored, scale[page, head, slot], zero)


def query_tokens(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Packed token of each right-aligned query slot, and whether it has one: ``[B, max_q_len]``."""
    assert call.q_offsets is not None  # the queries are packed
    offsets = call.q_offsets.long()
    stop = offsets[1:, None]
    slot = torch.arange(call.max_q_len, device=call.device)
    token = stop - call.max_q_len + slot
    return token, token >= offsets[:-1, None]


@torch.library.custom_op(
    "gqa_kernels::reference_cache_append", mutates_args=schema.WRITTEN, schema=schema.APPEND.text
)
def append_op(*arguments: object) -> Tensor:
    """:func:`reference_append` as one op: compilers see what it writes, and not how."""
    call = AppendCall.of_arguments(schema.APPEND.Arguments(*arguments))
    rotated = reference_append(call)
    return call.k_new.new_empty(0) if rotated is None else rotated


append_op.register_fake(schema.fake_append)


def reference_append(call: AppendCall) -> Tensor | None:
    """Write the new tokens into the view's memory and return the rotated queries, if any."""
    view = call.kv
    k_new, v_new, q = call.k_new, call.v_new, call.q
    if call.new_offsets is None:
        i = torch.arange(k_new.shape[2], device=view.device).expand(view.batch, -1)
        sequence = torch.arange(view.batch, device=view.device)[:, None].expand_as(i)
        row = (sequence, i)
    else:
        token = torch.arange(k_new.shape[2], device=view.device)
        offsets = call.new_offsets.long()
        sequence = torch.searchsorted(offsets, token, right=True) - 1
        inside = sequence < view.batch
        token, sequence = token[inside], sequence[inside]
        row = (torch.zeros_like(sequence), token)
        i = token - offsets[sequence]
    # One row per new token of a sequence: [..., H, D].
    k_rows, v_rows = k_new.transpose(1, 2)[row], v_new.transpose(1, 2)[row]
    assert view.kv_lengths is not None  # every cache has them
    position = view.kv_lengths.long()[sequence] + i[..., None]  # [..., Hk]
    if call.rotary_cos is not None and call.rotary_sin is not None:
        table = (call.rotary_cos, call.rotary_sin, call.rotary_interleaved)
        k_rows = rotate(k_rows, position, *table)
        if q is not None:
            q = q.clone()
            q.transpose(1, 2)[row] = rotate(q.transpose(1, 2)[row], position[..., :1], *table)
    _store(view, "k", k_rows, sequence, position)
    shared = position if view.num_v_heads == view.num_k_heads else position[..., :1].expand(
        *i.shape, view.num_v_heads)  # fmt: skip
    _store(view, "v", v_rows, sequence, shared)
    return q


@torch.library.custom_op(
    "gqa_kernels::reference_cache_keep", mutates_args=schema.WRITTEN, schema=schema.KEEP.text
)
def keep_op(*arguments: object) -> None:
    """:func:`reference_keep` as one op."""
    reference_keep(KeepCall.of_arguments(schema.KEEP.Arguments(*arguments)))


keep_op.register_fake(schema.fake_nothing)


def reference_keep(call: KeepCall) -> None:
    """Move the kept keys of the view's memory to the front."""
    view, source = call.kv, call.indices.long()
    target = torch.arange(source.shape[2], device=view.device)[None, None]
    length = _lengths(view)[..., None]
    counts = torch.minimum(call.counts.long()[..., None], length)
    moves = (target < counts) & (source >= 0) & (source < length)
    from_page, from_slot, unreadable = _places(view, source.clamp(min=0))
    to_page, to_slot, unwritable = _places(view, target.expand(view.batch, 1, -1))
    moves &= ~unreadable & ~unwritable
    for side, heads in (("k", view.num_k_heads), ("v", view.num_v_heads)):
        # Value heads that are not as many as the key heads share the pages and lengths of all.
        shared = slice(None) if heads == view.num_k_heads else slice(1)
        chosen = moves[:, shared].expand(-1, heads, -1)
        head = torch.arange(heads, device=view.device)[:, None].expand_as(chosen)[chosen]
        page, slot, new_page, new_slot = (
            place[:, shared].expand_as(chosen)[chosen]
            for place in (from_page, from_slot, to_page, to_slot)
        )
        for part in ("", "_scale", "_zero"):
            x = getattr(view, side + part)
            if x is None or (part and not is_dynamic(x)):
                continue
            x = x[..., None] if part else x
            raw = x.view(torch.uint8) if x.element_size() == 1 else x
            _put(x, new_page, head, new_slot, raw[page, head, slot].view(x.dtype))


def _store(view: KVView, side: str, rows: Tensor, sequence: Tensor, position: Tensor) -> None:
    """Write rows ``[..., H, D]`` at ``position [..., H]`` of their sequence ``[...]``."""
    storage, scale, zero = (getattr(view, side + part) for part in ("", "_scale", "_zero"))
    heads, dim = rows.shape[-2:]
    rows, position = rows.reshape(-1, heads, dim), position.reshape(-1, heads)
    sequence = sequence.reshape(-1)
    slot = position
    if view.kv_begin is not None:
        slot = slot + view.kv_begin.long()[sequence][:, None]
    entry = slot // view.page_size
    head = torch.arange(heads, device=rows.device).expand_as(slot)
    page = sequence[:, None].expand_as(slot)
    if view.page_table is not None:
        row = head.clamp(max=view.num_k_heads - 1)
        page = view.page_table[page, row, entry.clamp(0, view.max_pages - 1)].long()
    inside = (entry >= 0) & (entry < view.max_pages) & (page >= 0) & (page < view.num_pages)
    page, head, slot, rows = (
        page[inside],
        head[inside],
        (slot % view.page_size)[inside],
        rows[inside],
    )
    format = view.format if side == "k" else view.value_format
    if scale is not None and format is not None:
        new_scale, new_zero = scale[page, head, slot], None
        if zero is not None:
            new_zero = zero[page, head, slot]
        if is_dynamic(scale):
            new_scale, new_zero = row_scales(rows, format, zero is not None)
            _put(scale[..., None], page, head, slot, new_scale[:, None])
            if new_zero is not None:
                _put(zero[..., None], page, head, slot, new_zero[:, None])
        rows = quantize(rows, format, new_scale, new_zero)
    _put(storage, page, head, slot, rows)


def _put(storage: Tensor, page: Tensor, head: Tensor, slot: Tensor, rows: Tensor) -> None:
    """``storage[page, head, slot] = rows`` through strides, which may be 0 in the head dim."""
    if storage.element_size() == 1:
        storage, rows = storage.view(torch.uint8), rows.view(torch.uint8)
    strides = storage.stride()
    extent = 1 + sum((n - 1) * s for n, s in zip(storage.shape, strides, strict=True))
    flat = storage.as_strided((extent,), (1,))
    first = page * strides[0] + head * strides[1] + slot * strides[2]
    flat[first[:, None] + torch.arange(rows.shape[1], device=rows.device)] = rows.to(storage.dtype)
