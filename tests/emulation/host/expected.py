"""What each call must launch, computed without the host code.

From the shapes of a call alone: kernels in order, grids, thread blocks, dynamic shared memory, what
the arguments hold beside the call itself, and how many bytes of workspace kernels write.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from gqa_kernels.backends.triton.splits import ceil_div, choose_splits

from ..cuda_params import DTYPES, AppendParams, AttentionParams, BackwardParams, KeepParams
from .library import Device

LOG2E = math.log2(math.e)
QUANTIZED = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 8, torch.int8: 8, torch.uint8: 4}
CLASSES = (64, 128, 256)

# Dynamic shared memory of a thread block in bytes, by head-dim class (and what else decides).
DECODE_SHARED = {
    (64, 16): 51_200, (128, 16): 69_632, (256, 16): 75_776,
    (64, 8): 38_912, (128, 8): 40_960, (256, 8): 77_824,
    (64, 4): 32_768, (128, 4): 40_960, (256, 4): 77_824,
}  # fmt: skip
PREFILL_SHARED = {64: 40_960, 128: 81_920, 256: 81_920}
QUANTIZED_PREFILL_SHARED = {64: 40_960, 128: 57_344, 256: 81_920}
BACKWARD_SHARED = {64: 49_664, 128: 98_816, 256: 98_560}
HOPPER_SHARED = {(64, 128): 116_912, (128, 128): 198_832, (128, 176): 215_216, (256, 80): 231_600}


@dataclass
class Launch:
    """One launch.

    Attributes:
        kernel: parts of the kernel's mangled name, in order.
        fields: numbers of its argument by dotted name.
        workspace: for each pointer of the argument into the workspace: offset from the start of it,
            and bytes that kernels write there.
    """

    kernel: tuple[str, ...]
    grid: tuple[int, int]
    block: int
    shared: int
    fields: dict[str, object] = field(default_factory=dict)
    workspace: dict[str, tuple[int, int]] = field(default_factory=dict)


def class_of(call: AttentionParams) -> int:
    return next(size for size in CLASSES if max(call.head_dim, call.value_head_dim) <= size)


def type_name(dtype: int) -> str:
    return {torch.bfloat16: "8BFloat16", torch.float16: "7Float16", torch.float32: "f"}[
        DTYPES[dtype]
    ]


def bits_of(dtype: int) -> int:
    return QUANTIZED.get(DTYPES[dtype], 16)


def changes_scores(call: AttentionParams) -> bool:
    """Beyond a positive scale."""
    return bool(call.scale <= 0 or call.softcap or call.alibi_slopes or call.attn_mask)


def in_vectors(address, strides, sizes, item_bits: int, vector_bytes: int) -> bool:
    """Whether every row of a tensor begins at a multiple of ``vector_bytes``."""
    item = max(item_bits // 8, 1)
    return (address or 0) % vector_bytes == 0 and all(
        size <= 1 or stride * item % vector_bytes == 0
        for stride, size in zip((strides.b, strides.h, strides.s), sizes, strict=True)
    )


def strictly_in_chunks(address, strides, dim: int) -> bool:
    """The rule of prefill and backward: every stride, and the row itself, in chunks of 16 bytes."""
    return not any(
        x % y for x, y in [(address or 0, 16), *((s, 8) for s in (strides.b, strides.h, strides.s))]
    ) and dim % 8 == 0  # fmt: skip


def decodes(call: AttentionParams, device: Device) -> bool:
    """Whether few queries make it decode's."""
    idle = call.q_len <= 128 and call.batch * call.num_heads * 2 < device.num_sms
    return (call.q_len <= 16 or idle) and not call.dropout_threshold


def forward(call: AttentionParams, device: Device) -> list[Launch]:
    """Attention. ``call`` has the addresses of its outputs."""
    if decodes(call, device):
        return decode(call, device)
    if device.capability == 90 and on_hopper(call):
        return hopper_prefill(call, device)
    return prefill(call)


def decode(call: AttentionParams, device: Device) -> list[Launch]:
    rows = call.batch * call.num_heads * call.q_len
    if rows == 0:
        return []
    size, bits, split_map = class_of(call), bits_of(call.k_dtype), bool(call.value_head_map)
    pairs = call.num_k_heads * call.num_v_heads if split_map else call.num_k_heads
    most_groups = min(pairs + 1, call.num_heads)
    tiles = (call.num_heads * call.q_len + 15 * most_groups) // 16
    groups = min(call.num_heads, max(call.num_k_heads, call.num_v_heads))
    visible = call.kv_len
    if call.window_left >= 0 and call.window_right >= 0:
        visible = min(visible, call.window_left + call.window_right + call.q_len)
    programs = call.batch * max(groups, ceil_div(call.num_heads * call.q_len, 16))
    # An SM has 1 KB more than a thread block may have, and keeps 1 KB for each; the rest is static.
    by_shared = (device.shared_limit + 1024) // (DECODE_SHARED[size, bits] + 1024 + 1280)
    slots = device.num_sms * max(1, min(by_shared, 2 if size == 256 else 3))
    blocks, even_parts = ceil_div(visible, 64), 0
    if call.kv_lengths and call.batch > 1:
        even_parts = max(1, 2 * slots // (programs // call.batch))
        parts = min(even_parts + call.batch, max(1, ceil_div(blocks, 2)) * call.batch)
        splits = 1 if parts == call.batch else 0
    else:
        splits = choose_splits(programs, blocks, slots).num_splits
        parts = splits * call.batch
    pages, slots_of_page = (
        (call.num_pages, call.page_size) if call.page_table else (call.batch, call.kv_len)
    )
    tokens = 2 if call.q_offsets else call.q_len
    stored = min(bits, 8) if bits < 16 else 16
    vectors = (
        in_vectors(call.q, call.q_stride, (call.batch, call.num_heads, tokens), 16, 16)
        and in_vectors(call.out, call.out_stride, (call.batch, call.num_heads, tokens), 16, 8)
        and in_vectors(call.k, call.k_stride, (pages, call.num_k_heads, slots_of_page), stored, 16)
        and in_vectors(call.v, call.v_stride, (pages, call.num_v_heads, slots_of_page), stored, 16)
        and call.value_head_dim % 4 == 0
    )
    variant = 2 if bits < 16 or not vectors else 1 if changes_scores(call) else 0
    formats = {
        torch.float8_e4m3fn: "10Float8E4M3", torch.float8_e5m2: "10Float8E5M2",
        torch.int8: "4Int8", torch.uint8: "8Int4Pair",
    }  # fmt: skip
    stored_type = formats.get(DTYPES[call.k_dtype], type_name(call.dtype))
    kernel = (
        "decode_kernel",
        stored_type,
        f"DecodeConfigILi{size}ELi{bits}E",
        f"VariantE{variant}E",
    )
    stride = ceil_div(call.value_head_dim, 4) * 4
    fields = {
        "tiles": tiles, "splits": splits, "parts": parts, "even_parts": even_parts,
        "most_keys": visible, "partial_stride": stride, "elements": not vectors,
    }  # fmt: skip
    workspace = {}
    if splits != 1:
        lse_bytes = 4 * parts * rows // call.batch
        out_bytes = lse_bytes * stride
        workspace = {"partial_out": (0, out_bytes), "partial_lse": (out_bytes, lse_bytes)}
        if splits == 0:
            workspace["sequence_parts"] = (out_bytes + lse_bytes, 8 * call.batch)
    main = Launch(kernel, (tiles * parts, 1), 128, DECODE_SHARED[size, bits], fields, workspace)
    combine = Launch(("combine_kernel",), (ceil_div(rows, 4), 1), 128, 0, fields, workspace)
    return [main, combine] if splits != 1 else [main]


def prefill(call: AttentionParams) -> list[Launch]:
    size, bits = class_of(call), bits_of(call.k_dtype)
    blocks = ceil_div(call.q_len, 128) * call.batch * call.num_heads
    if blocks == 0:
        return []
    aligned = strictly_in_chunks(call.q, call.q_stride, call.head_dim)
    if bits < 16:
        piece = 8 if bits == 4 else 16
        aligned = aligned and not any(
            x % piece for side in "kv" for stride in [getattr(call, f"{side}_stride")]
            for x in (getattr(call, side) or 0, stride.b, stride.h, stride.s)
        )  # fmt: skip
    else:
        aligned = (
            aligned
            and strictly_in_chunks(call.k, call.k_stride, call.head_dim)
            and strictly_in_chunks(call.v, call.v_stride, call.value_head_dim)
        )
    general = bool(bits < 16 or not aligned or changes_scores(call) or call.dropout_threshold)
    config = f"{'22Quantized' if bits < 16 else '13'}PrefillConfigILi{size}E"
    flags = f"Lb{int(general)}ELb{int(bits == 16 and bool(call.page_table))}E"
    kernel = ("prefill_sm80_kernel", type_name(call.dtype), config, flags)
    shared = (QUANTIZED_PREFILL_SHARED if bits < 16 else PREFILL_SHARED)[size]
    fields = {
        "softmax_scale": 1.0 if general else call.scale * LOG2E,
        "elements": not aligned,
        "section_pairs": section_pairs(call),
    }
    return [Launch(kernel, (blocks, 1), 256 if size == 256 else 128, shared, fields)]


def section_pairs(call: AttentionParams) -> int:
    """(sequence, head) pairs whose K and V fill 20 MB."""
    per_kv_head = max(1, call.num_heads // call.num_k_heads)
    bits = call.kv_len * (call.head_dim + call.value_head_dim) * bits_of(call.k_dtype)
    kv_heads = max(1, (20 << 20) // max(1, bits // 8))
    return min(call.batch * call.num_heads, kv_heads * per_kv_head)


def on_hopper(call: AttentionParams) -> bool:
    """Whether the TMA kernel takes a prefill: every row aligned, pages of whole swizzles."""
    aligned = all(
        0 in sizes or for_tma(getattr(call, name), getattr(call, f"{name}_stride"), sizes)
        for name, sizes in hopper_sizes(call).items()
    )
    one_page = not call.page_table or call.max_pages == 1
    whole = one_page or (call.page_size >= 8 and call.page_size % 8 == 0 and not call.kv_begin)
    sixteen_bits = call.k_dtype == call.dtype
    unmasked = not (call.attn_mask and call.q_offsets)
    return bool(aligned and whole and sixteen_bits and unmasked and not call.dropout_threshold)


def hopper_sizes(call: AttentionParams) -> dict[str, tuple[int, int, int]]:
    """Batch, heads and length of the tensors as TMA sees them."""
    queries = (1, call.q_tokens) if call.q_offsets else (call.batch, call.q_len)
    pages, slots = call.batch, call.kv_len
    if call.page_table:
        pages, slots = call.num_pages, call.page_size
    elif call.k_stride.b == call.v_stride.b == 0:
        pages = 1
    return {
        "q": (queries[0], call.num_heads, queries[1]),
        "k": (pages, call.num_k_heads, slots),
        "v": (pages, call.num_v_heads, slots),
        "out": (queries[0], call.num_heads, queries[1]),
    }


def for_tma(address, strides, sizes) -> bool:
    """Whether a descriptor can address a tensor: rows at multiples of 16 bytes, strides > 0."""
    taken = [
        x
        for x, size in zip((strides.b, strides.h, strides.s), sizes, strict=True)
        if size != 1
    ]  # fmt: skip
    return address % 16 == 0 and all(x > 0 and 2 * x % 16 == 0 and 2 * x < 1 << 40 for x in taken)


def hopper_prefill(call: AttentionParams, device: Device) -> list[Launch]:
    size = class_of(call)
    rows = 192 if size == 64 else 128
    packed = bool(call.q_offsets)
    q_blocks, units = ceil_div(call.q_len, rows), call.num_heads * (1 if packed else call.batch)
    tiles = q_blocks * call.batch * call.num_heads
    if packed:
        tiles = min(tiles, (call.q_tokens // rows + call.batch) * call.num_heads)
    if tiles == 0 or 0 in hopper_sizes(call)["q"]:
        return []
    several_pages = bool(call.page_table) and call.max_pages != 1
    bounded = call.window_left >= 0 or call.window_right >= 0
    modified = changes_scores(call)
    block_n = 80 if size == 256 else 176 if size == 128 else 128
    if block_n == 176 and (bounded or modified or several_pages):
        block_n = 128
    draws = (bounded or bool(call.kv_lengths) or packed) and tiles > device.num_sms
    head_bytes = max(1, 2 * call.kv_len * (call.head_dim + call.value_head_dim))
    kv_heads = max(1, (32 << 20) // head_bytes)
    fields = {
        "schedule.q_blocks": q_blocks, "schedule.units": units,
        "schedule.section": max(1, min(units, kv_heads * call.num_heads // call.num_k_heads)),
        "schedule.last_block_first": call.window_right >= 0,
        "box_rows": math.gcd(call.page_size, block_n) if several_pages else block_n,
    }  # fmt: skip
    if not draws:
        fields["schedule.counter"] = 0
    kernel = (
        "14prefill_kernel", type_name(call.dtype), f"ConfigILi{size}ELi{block_n}E",
        f"Lb{int(modified)}E",
    )  # fmt: skip
    workspace = {"schedule.counter": (0, 4)} if draws else {}
    block, shared = 512 if size == 64 else 384, HOPPER_SHARED[size, block_n]
    return [Launch(kernel, (min(tiles, device.num_sms), 1), block, shared, fields, workspace)]


def tensor_maps(call: AttentionParams, block_n: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Extents, byte strides and boxes of the Hopper kernel's descriptors, innermost first."""
    rows = 192 if class_of(call) == 64 else 128
    several_pages = bool(call.page_table) and call.max_pages != 1
    key_rows = math.gcd(call.page_size, block_n) if several_pages else block_n
    boxes = {"q": rows, "k": key_rows, "v": key_rows, "out": 64}
    found = {}
    for name, (batch, heads, length) in hopper_sizes(call).items():
        dim, box_rows = call.head_dim if name in "qk" else call.value_head_dim, boxes[name]
        if 0 in (length, heads, batch):
            continue
        stride = getattr(call, f"{name}_stride")
        pairs = ((length, stride.s), (heads, stride.h), (batch, stride.b))
        # A stride that is never taken is one that the driver accepts.
        strides = tuple(16 if extent == 1 else 2 * x for extent, x in pairs)
        found[name] = {
            "dims": (dim, length, heads, batch), "strides": strides, "box": (64, box_rows, 1, 1)
        }  # fmt: skip
    return found


def backward(params: BackwardParams) -> list[Launch]:
    call = params.call
    size, pairs = class_of(call), call.batch * call.num_heads
    block, threads = {64: (128, 128), 128: (128, 256), 256: (64, 128)}[size]
    q_blocks, kv_blocks = ceil_div(call.q_len, block), ceil_div(params.max_kv_len, block)
    number_blocks = ceil_div(call.q_len, 32)
    packed = bool(call.q_offsets)
    padded = 32 * (call.q_tokens // 32 + call.batch if packed else number_blocks)
    numbers = (call.num_heads if packed else pairs) * padded * 8
    sums = pairs * q_blocks * 8 if params.dslopes or params.dsinks else 0
    chunks = {
        name: strictly_in_chunks(
            getattr(owner, name), getattr(owner, f"{name}_stride"),
            call.head_dim if name in "qk" else call.value_head_dim,
        )
        for owner, names in ((call, ("q", "k", "v", "out")), (params, ("dout",)))
        for name in names
    }  # fmt: skip
    elements = not all(chunks[name] for name in ("q", "k", "v", "dout"))
    general = bool(elements or changes_scores(call) or call.dropout_threshold)
    shared_map = not call.value_head_map
    common = {
        "padded_len": padded, "number_blocks": number_blocks, "sum_blocks": q_blocks,
        "softmax_scale": call.scale * LOG2E, "elements": elements,
        "out_elements": not (chunks["out"] and chunks["dout"]), "shared": shared_map,
    }  # fmt: skip
    workspace = {"numbers": (0, numbers)}
    if sums:
        workspace["head_sums"] = (numbers, sums)
    else:
        common["head_sums"] = 0
    launches = []

    def add(kernel, grid, block, shared, **fields):
        if grid > 0:
            launches.append(
                Launch(kernel, (grid, 1), block, shared, {**common, **fields}, workspace)
            )

    name, config = type_name(call.dtype), f"BackwardConfigILi{size}E"
    bit = int(general)
    add(("backward_numbers_kernel", name), pairs * number_blocks, 256, 0)
    both = shared_map and size != 256
    groups = ((call.num_k_heads, params.dk, params.dv, False),) if both else (
        (call.num_k_heads, params.dk, None, False),
        (call.num_k_heads if shared_map else call.num_v_heads, None, params.dv, not shared_map),
    )  # fmt: skip
    for heads, dk, dv, by_value in groups:
        wanted = f"Lb{int(size != 256 or dk is not None)}ELb{int(size != 256 or dv is not None)}E"
        add(
            ("backward_kv_kernel", name, config, f"Lb{bit}E" + wanted),
            kv_blocks * call.batch * heads, threads, BACKWARD_SHARED[size],
            **{"params.dk": dk or 0, "params.dv": dv or 0, "by_value": by_value},
        )  # fmt: skip
    add(
        ("backward_q_kernel", name, config, f"Lb{bit}ELb{int(general or sums > 0)}E"),
        pairs * q_blocks, threads, BACKWARD_SHARED[size], section_pairs=section_pairs(call),
    )  # fmt: skip
    if params.dsinks:
        add(("backward_sinks_kernel",), call.num_heads, 256, 0)
    if params.dslopes:
        add(("backward_slopes_kernel",), pairs, 256, 0)
    return launches


def append(params: AppendParams) -> list[Launch]:
    cache = params.cache
    packed = bool(params.new_offsets)
    tokens = params.num_tokens * (1 if packed else cache.batch)
    if tokens == 0:
        return []
    dims = max(cache.head_dim, cache.value_head_dim)
    lanes = 1 << max(0, math.ceil(math.log2(dims / 8)))
    heads = cache.num_k_heads + cache.num_v_heads + (cache.num_heads if params.q else 0)
    item = 32 if DTYPES[params.dtype] == torch.float32 else 16
    bits = QUANTIZED.get(DTYPES[cache.k_dtype], item)
    pages = cache.num_pages if cache.page_table else cache.batch
    source = (1 if packed else cache.batch, params.num_tokens)
    fields: dict[str, object] = {"rows": tokens * heads, "heads": heads, "lanes": lanes}

    def vectors(address, strides, sizes, item_bits) -> bool:
        return in_vectors(address, strides, sizes, item_bits, min(8 * item_bits // 8, 16))

    sides = [
        ("k", cache.num_k_heads, cache.head_dim),
        ("v", cache.num_v_heads, cache.value_head_dim),
    ]
    for i, (name, count, dim) in enumerate(sides):
        new, stored = f"{name}_new", getattr(cache, f"{name}_stride")
        new_stride = getattr(params, f"{new}_stride")
        sizes = (source[0], count, source[1])
        fields |= {
            f"sides[{i}].source": getattr(params, new), f"sides[{i}].target": getattr(params, name),
            f"sides[{i}].scale": getattr(params, f"{name}_scale") or 0,
            f"sides[{i}].zero": getattr(params, f"{name}_zero") or 0,
            f"sides[{i}].source_vectors": vectors(getattr(params, new), new_stride, sizes, item),
            f"sides[{i}].target_vectors": vectors(
                getattr(params, name), stored, (pages, count, cache.page_size), bits
            ),
            f"sides[{i}].dim": dim, f"sides[{i}].turned": name == "k" and bool(params.rotary_cos),
            f"sides[{i}].dynamic": getattr(params, f"{name}_dynamic"),
        }  # fmt: skip
        for axis in "bhs":
            fields[f"sides[{i}].source_stride.{axis}"] = getattr(new_stride, axis)
            fields[f"sides[{i}].target_stride.{axis}"] = getattr(stored, axis)
    if params.q:
        fields |= {"sides[2].source": params.q, "sides[2].target": params.q_rotated,
                   "sides[2].dim": cache.head_dim, "sides[2].turned": True}  # fmt: skip
    kernel = ("append_kernel", f"I{type_name(params.dtype)}" if item == 32 else
              type_name(params.dtype), f"Lb{int(bits < 16)}E")  # fmt: skip
    return [Launch(kernel, (ceil_div(tokens * heads, 128 // lanes), 1), 128, 0, fields)]


def keep(params: KeepParams) -> list[Launch]:
    cache = params.cache
    rows = cache.batch * (cache.num_k_heads + cache.num_v_heads)
    if rows == 0 or params.num_indices == 0:
        return []
    pages = cache.num_pages if cache.page_table else cache.batch

    def in_pieces(name: str, heads: int) -> bool:
        side, stride = getattr(params, name), getattr(cache, f"{name}_stride")
        item = 8 * side.element_bytes
        sizes = (pages, heads, cache.page_size)
        return side.row_bytes % 16 == 0 and in_vectors(side.data, stride, sizes, item, 16)

    pieces = in_pieces("k", cache.num_k_heads) and in_pieces("v", cache.num_v_heads)
    most = max(params.k.row_bytes, params.v.row_bytes)
    kernel = ("keep_kernel", "5uint4" if pieces else "Ih")
    return [Launch(kernel, (rows, ceil_div(most, 64)), 128, 0)]
