"""Checks of tensors and head maps, with the errors that users see: name, rule and value."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..cache.tensors import (
    DTYPES,
    Layout,
    check_last_stride,
    check_layout,
    is_readable,
    to_int32,
)
from ..head_map import HeadMap, bounded, checked_entries
from ..native.arguments import as_int, check_tensors, shown

HeadMapLike = HeadMap | Sequence[int] | Tensor

_MAP_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_ONLY_INT = {int}


def check_dense(q: Tensor, k: Tensor, v: Tensor, head_axis: int) -> None:
    """Types, devices, strides and sizes of ``[B, H, S, D]`` views; ``head_axis`` is where the
    caller's layout has the heads."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensors(**{name: x})
        if x.dim() != 4:
            shape = _shape(x.transpose(1, 2)) if head_axis == 2 and x.dim() > 2 else _shape(x)
            raise ValueError(f"{name} must have 4 dimensions, got {x.dim()} (shape {shape})")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}.dtype must be one of {_names(DTYPES)}, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}.dtype must equal q.dtype ({q.dtype}), got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}.device must equal q.device ({q.device}), got {x.device}")
        check_last_stride(name, x)
    token_axis = 3 - head_axis
    batch, q_heads, _, head_dim = q.shape
    k_batch, k_heads, kv_len, k_head_dim = k.shape
    v_batch, v_heads, v_len, _ = v.shape
    for name, found, expected in (("k", k_batch, batch), ("v", v_batch, batch)):
        if found != expected:
            raise ValueError(f"{name}.shape[0] must equal q.shape[0] ({expected}), got {found}")
    if k_head_dim != head_dim:
        raise ValueError(f"k.shape[3] must equal q.shape[3] ({head_dim}), got {k_head_dim}")
    if v_len != kv_len:
        raise ValueError(
            f"v.shape[{token_axis}] must equal k.shape[{token_axis}] ({kv_len}), got {v_len}"
        )
    if q_heads < 1 or k_heads < 1 or v_heads < 1:
        raise ValueError(
            f"q, k and v.shape[{head_axis}] (heads) must be at least 1, "
            f"got {q_heads}, {k_heads} and {v_heads}"
        )
    check_head_dims(k, v, 3)


def check_head_dims(k: Tensor, v: Tensor, axis: int) -> None:
    """Keys and values have at least one number; ``axis`` is where the caller's layout has it."""
    for name, x in (("k", k), ("v", v)):
        if x.shape[-1] < 1:
            raise ValueError(f"{name}.shape[{axis}] (head dim) must be at least 1, got 0")


def check_floating(name: str, x: Tensor, device: torch.device) -> None:
    """Dtype, device and last stride of a tensor of vectors."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}.dtype must be one of {_names(DTYPES)}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}.device must equal the cache's ({device}), got {x.device}")
    check_last_stride(name, x)


def heads_first(name: str, x: Tensor, layout: Layout, packed: bool) -> Tensor:
    """``[B, H, S, D]`` view of a tensor in ``layout``, or of packed ``[total, H, D]``."""
    check_layout(layout)
    check_tensors(**{name: x})
    rank = 3 if packed else 4
    if x.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got {x.dim()} (shape {_shape(x)})")
    if packed:
        return x.transpose(0, 1)[None]
    return x.transpose(1, 2) if layout == "bshd" else x


def from_heads_first(x: Tensor, layout: Layout, packed: bool) -> Tensor:
    """A ``[B, H, S, D]`` tensor in ``layout``, or packed as ``[total, H, D]``."""
    if packed:
        return x[0].transpose(0, 1)
    return x.transpose(1, 2) if layout == "bshd" else x


def dense_heads_first(q: Tensor, k: Tensor, v: Tensor, bshd: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Views as ``[B, H, S, D]`` of what is possibly not such a tensor."""
    if bshd:
        q, k, v = (
            x.transpose(1, 2) if isinstance(x, Tensor) and x.dim() > 2 else x for x in (q, k, v)
        )
    return q, k, v


@lru_cache(maxsize=1024)
def interned_map(entries: tuple[int, ...], num_kv_heads: int) -> HeadMap:
    """One HeadMap per content, so that plans cached on it are found again."""
    return HeadMap(entries, num_kv_heads)


def resolve_map(
    name: str, value: HeadMapLike, num_heads: int, num_kv_heads: int, rule: str,
    device: torch.device | None,
) -> HeadMap | Tensor:  # fmt: skip
    """A HeadMap if the host can read the map, else an int32 tensor ``[Hq]``.

    Args:
        rule: what ``num_kv_heads`` is, in the caller's words.
        device: of the queries; None is the CPU.
    """
    if isinstance(value, Tensor):
        check_tensors(**{name: value})
        if value.dtype not in _MAP_DTYPES:
            raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")
        if value.dim() != 1:
            raise ValueError(f"{name} must have 1 dimension, got {value.dim()} {_shape(value)}")
        if value.numel() != num_heads:
            raise ValueError(
                f"{name} must have one entry per query head ({num_heads}), got {value.numel()}"
            )
        if not is_readable(value):
            if value.device != device:
                raise ValueError(
                    f"{name}.device must equal q.device ({device}), got {value.device}"
                )
            return to_int32(value)
        value = value.tolist()
    if not isinstance(value, HeadMap):
        if hasattr(value, "tolist"):  # a numpy array
            value = value.tolist()
        if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            raise TypeError(
                f"{name} must be a HeadMap, a sequence of integers or an integer tensor, "
                f"got {type(value).__name__}"
            )
        entries = tuple(value if type(value) in (list, tuple) else bounded(name, value))
        if set(map(type, entries)) != _ONLY_INT:  # converts numpy integers, refuses the rest
            entries = checked_entries(name, entries)
        try:
            value = interned_map(entries, num_kv_heads)
        except ValueError:
            for head, entry in enumerate(bounded(name, entries)):
                if not 0 <= entry < num_kv_heads:
                    raise ValueError(
                        f"{name} entries must lie in [0, {rule} ({num_kv_heads})), "
                        f"got {entry} at head {head}"
                    ) from None
            raise
    if value.num_heads != num_heads:
        raise ValueError(
            f"{name} must have one entry per query head ({num_heads}), got {value.num_heads}"
        )
    if value.num_kv_heads != num_kv_heads:
        raise ValueError(
            f"{rule} must equal {name}.num_kv_heads ({value.num_kv_heads}), got {num_kv_heads}"
        )
    return value


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of scores and softmax: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resolve_slopes(slopes: Tensor, q: Tensor, batch: int) -> Tensor:
    """fp32 ``[B, Hq]``."""
    _check_float_tensor("alibi_slopes", slopes, q)
    heads = q.shape[1]
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), got {_shape(slopes)}"
        )
    return slopes.to(score_dtype(q.dtype)).expand(batch, heads)


def resolve_sinks(sinks: Tensor, q: Tensor) -> Tensor:
    """fp32 ``[Hq]``."""
    _check_float_tensor("sinks", sinks, q)
    if sinks.dim() != 1 or sinks.size(0) != q.size(1):
        raise ValueError(f"sinks must have shape ({q.shape[1]},), got {_shape(sinks)}")
    dtype = score_dtype(q.dtype)
    return sinks if sinks.dtype == dtype else sinks.to(dtype)


def resolve_mask(mask: Tensor, q: Tensor, target: tuple[int, ...], memory: str) -> Tensor:
    """Boolean or floating ``target [B, Hq, Sq, Sk]``, strides may be 0.

    Over a cache the mask may have fewer keys than the cache has room for: it then hides the rest.
    """
    check_tensors(attn_mask=mask)
    if mask.dtype != torch.bool:
        if not mask.dtype.is_floating_point:
            raise TypeError(f"attn_mask.dtype must be bool or floating, got {mask.dtype}")
        if mask.dtype not in (q.dtype, torch.float32):
            mask = mask.to(score_dtype(q.dtype))
    if mask.device != q.device:
        raise ValueError(f"attn_mask.device must equal q.device ({q.device}), got {mask.device}")
    have = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if memory == "cache" and mask.dim() and 1 < have[-1] < target[-1]:
        hidden = False if mask.dtype == torch.bool else -torch.inf
        mask = torch.nn.functional.pad(mask, (0, target[-1] - have[-1]), value=hidden)
        have = (*have[:-1], target[-1])
    if mask.dim() > 4 or any(h not in (1, t) for h, t in zip(have, target, strict=True)):
        raise ValueError(
            f"attn_mask must broadcast to [B, Hq, Sq, Sk] = {target}, got {_shape(mask)}"
        )
    return mask.expand(target)


def resolve_ranges(ranges: Tensor, q: Tensor, target: tuple[int, int, int]) -> Tensor:
    """int32 ``target + (2,)``, target ``[B, Hq, Sq]``; strides may be 0 but for the last."""
    check_tensors(key_ranges=ranges)
    if ranges.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_ranges.dtype must be int32 or int64, got {ranges.dtype}")
    if ranges.device != q.device:
        raise ValueError(f"key_ranges.device must equal q.device ({q.device}), got {ranges.device}")
    batch, heads, tokens = target
    if ranges.shape not in ((batch, 1, tokens, 2), (batch, heads, tokens, 2)):
        raise ValueError(
            f"key_ranges must have shape ({batch}, 1 or {heads}, {tokens}, 2), got {_shape(ranges)}"
        )
    if ranges.dtype != torch.int32:
        limits = torch.iinfo(torch.int32)
        ranges = ranges.clamp(limits.min, limits.max).int()
    if ranges.stride(3) != 1:
        ranges = ranges.contiguous()
    return ranges.expand(*target, 2)


def resolve_lengths(lengths: Tensor | Sequence[int], k: Tensor) -> Tensor:
    """int32 ``[B, Hk]``, strides may be 0."""
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.tensor(lengths, device=k.device)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise TypeError(
                f"kv_lengths must be an integer tensor or a sequence of integers, "
                f"got {shown(lengths)}"
            ) from None
        if lengths.numel() == 0:
            lengths = lengths.to(torch.int32)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"kv_lengths.dtype must be int32 or int64, got {lengths.dtype}")
    if lengths.device != k.device:
        raise ValueError(
            f"kv_lengths.device must equal q.device ({k.device}), got {lengths.device}"
        )
    batch, heads, kv_len = k.shape[:3]
    if lengths.shape not in ((batch,), (batch, heads)):
        raise ValueError(
            f"kv_lengths must have shape ({batch},) or ({batch}, {heads}), got {_shape(lengths)}"
        )
    if is_readable(lengths) and lengths.numel():
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > kv_len:
            raise ValueError(
                f"kv_lengths must lie in [0, Sk ({kv_len})], got {low if low < 0 else high}"
            )
    lengths = to_int32(lengths)
    return (lengths[:, None] if lengths.dim() == 1 else lengths).expand(batch, heads)


def first_rows(x: Any, axis: int, given: int | None, most: int) -> Any:
    """``x``, or its first ``most`` rows along ``axis`` if it has the ``given`` number of them: the
    caller's bound of a sequence's tokens, of which there are fewer."""
    if isinstance(x, Tensor) and x.dim() >= -axis and x.shape[axis] == given and given > most:
        return x.narrow(axis, 0, most)
    return x


def check_offsets(name: str, offsets: object, batch: int, device: torch.device) -> None:
    """Offsets of packed sequences by what every tensor shows without its numbers."""
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        got = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {got}")
    if offsets.shape != (batch + 1,):
        raise ValueError(f"{name} must have shape ({batch + 1},), got {_shape(offsets)}")
    if offsets.device != device:
        raise ValueError(f"{name}.device must be {device}, got {offsets.device}")


def resolve_offsets(
    name: str, offsets: Tensor, longest_name: str, longest: int | None, x: Tensor, batch: int
) -> tuple[Tensor, int]:
    """Checked int32 offsets of packed sequences, and the most tokens of one sequence.

    Args:
        name, longest_name: what the caller knows ``offsets`` and ``longest`` as.
        longest: a bound for the most tokens, or None to read it from the offsets.
        x: ``[1, H, total, D]``.
    """
    tokens = x.shape[2]
    check_offsets(name, offsets, batch, x.device)
    if longest is not None:
        longest = check_longest(longest_name, longest)
    if is_readable(offsets):
        # The range comes first: differences of values outside it could overflow.
        low, high = (int(value) for value in offsets.aminmax())
        sizes = offsets.diff()
        if int(offsets[0]) != 0 or low < 0 or high > tokens or (sizes < 0).any():
            raise ValueError(
                f"{name} must ascend from 0 to at most the tokens given ({tokens}), "
                f"got {offsets.tolist()}"
            )
        most = int(sizes.max()) if batch else 0
        longest = most if longest is None else longest
        if longest < most:
            raise ValueError(
                f"{longest_name} must be at least the longest sequence of {name} ({most}), "
                f"got {longest}"
            )
    if longest is None:
        raise ValueError(f"{longest_name} must be given when the host can't read {name}")
    return to_int32(offsets), min(longest, tokens)


def check_longest(name: str, longest: object) -> int:
    """A bound for the most tokens of a sequence."""
    longest = as_int(name, longest)
    if longest < 0:
        raise ValueError(f"{name} must be non-negative, got {longest}")
    return longest


def resolve_rotary(cos: Tensor, sin: Tensor, x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Tables as kernels read them: contiguous ``[max_position, R / 2]``, fp32 or x's dtype."""
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_tensors(**{name: table})
        if table.dtype not in DTYPES:
            raise TypeError(f"{name}.dtype must be floating, got {table.dtype}")
        if table.device != x.device:
            raise ValueError(f"{name}.device must be {x.device}, got {table.device}")
        width = table.shape[1] if table.dim() == 2 and table.shape[0] >= 1 else 0
        is_full = 2 * width > x.shape[3]
        if not 1 <= width <= x.shape[3] or (is_full and width % 2):
            raise ValueError(
                f"{name} must have shape [max_position, R / 2], or [max_position, R] with every "
                f"angle twice, with even R <= D ({x.shape[3]}), got {_shape(table)}"
            )
    if cos.shape != sin.shape:
        raise ValueError(
            f"rotary_sin must have the shape of rotary_cos ({_shape(cos)}), got {_shape(sin)}"
        )
    if 2 * cos.shape[1] > x.shape[3]:
        cos = _first_half("rotary_cos", cos, interleaved)
        sin = _first_half("rotary_sin", sin, interleaved)
    if cos.dtype != sin.dtype or cos.dtype not in (x.dtype, torch.float32):
        cos, sin = cos.float(), sin.float()
    return cos.contiguous(), sin.contiguous()


def _first_half(name: str, table: Tensor, interleaved: bool) -> Tensor:
    """Each angle once, of a table ``[max_position, R]`` that has it in both columns of its pair."""
    pairs = table.unflatten(1, (-1, 2) if interleaved else (2, -1))
    once, again = pairs.unbind(2 if interleaved else 1)
    if is_readable(table) and not torch.equal(once, again):
        where = "(2i, 2i + 1)" if interleaved else "(i, i + R / 2)"
        raise ValueError(
            f"{name} of full width [max_position, R] must have equal columns {where} for "
            f"rotary_interleaved={interleaved}, got {shown(table)}"
        )
    return once


def _check_float_tensor(name: str, x: Tensor, q: Tensor) -> None:
    if type(x) is not Tensor or x.layout is not torch.strided:
        check_tensors(**{name: x})
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}.dtype must be floating, got {x.dtype}")
    if not (x.is_cpu and q.is_cpu) and x.device != q.device:
        raise ValueError(f"{name}.device must equal q.device ({q.device}), got {x.device}")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
