"""CacheInputs and AppendInputs: checked, normalised calls on a KV view."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..autograd import is_transformed, requires_grad
from ..head_map import HeadMap
from ..inputs import (
    DTYPES,
    LAYOUTS,
    UNBOUNDED,
    HeadMapLike,
    Layout,
    _map_tensor,
    _readable,
    _resolve_map,
    _resolve_mask,
    _resolve_scale,
    _resolve_sinks,
    _resolve_slopes,
    _resolve_softcap,
    _resolve_window,
    _to_int32,
    as_int,
)
from .view import KVView


@dataclass(frozen=True)
class PackedKV:
    """Keys and values of packed sequences, as they were given.

    Attributes:
        k: ``[1, Hk, total_k, D]``.
        v: ``[1, Hv, total_k, Dv]``.
        offsets: int32 ``[B + 1]``: sequence ``b`` has the tokens ``offsets[b]`` up to
            ``offsets[b + 1]``.
    """

    k: Tensor
    v: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class CacheInputs:
    """Attention of queries over a KV view; made by :meth:`create`.

    Attributes:
        q: ``[B, Hq, Sq, D]``; with ``q_offsets`` ``[1, Hq, total_q, D]``.
        view: the keys and values.
        q_offsets: int32 ``[B + 1]`` or None: the queries of sequence ``b`` are the tokens
            ``q_offsets[b]`` up to ``q_offsets[b + 1]``.
        max_q_len: most query tokens of a sequence: sizes grids and nothing else.
        max_kv_len: likewise of keys, for the choice of splits.
        lse_wanted: false where the LSE won't be read, which then may be rounded as out is.
        packed_kv: what the view is of, where it is of packed sequences: what gradients are of.
        head_map, value_head_map, scale, window_left, window_right, softcap, alibi_slopes, sinks,
        attn_mask, layout, deterministic: as in :class:`~gqa_kernels.inputs.AttentionInputs`; the
            mask is ``[B, Hq, Sq, capacity]``, over a sequence's keys. With ``q_offsets`` layout
            ``"bshd"`` is memory ``[total_q, Hq, Dv]``.
    """

    q: Tensor
    view: KVView
    q_offsets: Tensor | None
    max_q_len: int
    max_kv_len: int
    head_map: HeadMap | Tensor
    value_head_map: HeadMap | Tensor | None
    scale: float
    window_left: int
    window_right: int
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    attn_mask: Tensor | None
    layout: Layout
    deterministic: bool
    packed_kv: PackedKV | None = None
    lse_wanted: bool = True

    @classmethod
    def create(
        cls,
        q: Tensor,
        view: KVView,
        head_map: HeadMapLike,
        *,
        q_offsets: Tensor | None = None,
        max_q_len: int | None = None,
        max_kv_len: int | None = None,
        value_head_map: HeadMapLike | None = None,
        causal: bool = True,
        scale: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        attn_mask: Tensor | None = None,
        layout: Layout = "bhsd",
        deterministic: bool = False,
        packed_kv: PackedKV | None = None,
    ) -> CacheInputs:
        """Check and normalise.

        Args:
            q: ``[B, Hq, Sq, D]`` or ``[B, Sq, Hq, D]`` by ``layout``; with ``q_offsets``
                ``[total_q, Hq, D]``.
            q_offsets: ``[B + 1]`` integers, ascending from 0.
            max_q_len: needed with ``q_offsets``.
            max_kv_len: default the view's capacity.
        """
        q, layout = to_heads_first("q", q, layout, q_offsets is not None)
        check_floating("q", q, view.device)
        batch = view.batch
        q_offsets, max_q_len = resolve_offsets(
            "cu_seqlens_q", q_offsets, "max_seqlen_q", max_q_len, q, batch
        )
        if view.format is None and q.dtype != view.k.dtype:
            raise TypeError(f"q.dtype must equal the cache's ({view.k.dtype}), got {q.dtype}")
        if q.shape[3] != view.head_dim:
            raise ValueError(
                f"the head dim of q must equal that of the cache's keys ({view.head_dim}), "
                f"got {q.shape[3]}"
            )
        if value_head_map is None and view.num_k_heads != view.num_v_heads:
            raise ValueError(
                f"the cache must have as many value heads as key heads ({view.num_k_heads}) where "
                f"no value_head_map is given, got {view.num_v_heads}"
            )
        if value_head_map is not None and view.pages_per_head:
            raise NotImplementedError(
                "value_head_map must be None where the page table is per head: a page of a key "
                "head holds the values of its own head"
            )
        if attn_mask is not None and q_offsets is not None:
            raise ValueError("attn_mask must be None where sequences are packed (cu_seqlens_q)")
        window_left, window_right = _resolve_window(window, causal)
        k_map = _resolve_map("head_map", head_map, q, view.num_k_heads, "key heads of the cache")
        v_map = None
        if value_head_map is not None:
            name = "value heads of the cache"
            v_map = _resolve_map("value_head_map", value_head_map, q, view.num_v_heads, name)
        return cls(
            q=q,
            view=view,
            q_offsets=q_offsets,
            max_q_len=max_q_len,
            max_kv_len=view.capacity if max_kv_len is None else min(max_kv_len, view.capacity),
            head_map=k_map,
            value_head_map=v_map,
            scale=_resolve_scale(scale, q.shape[3]),
            window_left=window_left,
            window_right=window_right,
            softcap=_resolve_softcap(softcap),
            alibi_slopes=_resolve_slopes(alibi_slopes, q.expand(batch, *q.shape[1:])),
            sinks=_resolve_sinks(sinks, q),
            attn_mask=_resolve_mask(attn_mask, q, view.capacity),
            layout=layout,
            deterministic=bool(deterministic),
            packed_kv=packed_kv,
        )

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def num_k_heads(self) -> int:
        return self.view.num_k_heads

    @property
    def num_v_heads(self) -> int:
        return self.view.num_v_heads

    @property
    def head_dim(self) -> int:
        return self.view.head_dim

    @property
    def value_head_dim(self) -> int:
        return self.view.value_head_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def head_map_tensor(self) -> Tensor:
        """The key head map as an integer tensor ``[Hq]`` on the call's device."""
        return _map_tensor(self.head_map, self.device)

    @property
    def value_head_map_tensor(self) -> Tensor | None:
        """The value head map likewise, or None where V follows the key head map."""
        return (
            None if self.value_head_map is None else _map_tensor(self.value_head_map, self.device)
        )

    @property
    def requires_grad(self) -> bool:
        tensors = (self.q, self.view.k, self.view.v, self.alibi_slopes, self.sinks, self.attn_mask)
        return requires_grad(*tensors)

    @property
    def options(self) -> list[str]:
        """Names of the options in use, as ``Capabilities.options`` has them."""
        used = {
            "value_head_map": self.value_head_map is not None,
            "window": self.window_left != UNBOUNDED or self.window_right != UNBOUNDED,
            "softcap": self.softcap > 0,
            "alibi": self.alibi_slopes is not None,
            "sinks": self.sinks is not None,
            "bool_mask": self.attn_mask is not None and self.attn_mask.dtype == torch.bool,
            "additive_mask": self.attn_mask is not None and self.attn_mask.dtype != torch.bool,
            "device_map": isinstance(self.head_map, Tensor)
            or isinstance(self.value_head_map, Tensor),
            "torch_func": is_transformed(
                self.q, self.view.k, self.view.v, self.alibi_slopes, self.sinks, self.attn_mask
            ),
        }
        return [name for name, is_used in used.items() if is_used]

    @property
    def caches(self) -> list[str]:
        """Kinds of memory and packing, as ``Capabilities.caches`` has them."""
        return self.view.kinds + (["varlen"] if self.q_offsets is not None else [])

    def describe(self) -> str:
        """The call in words, for errors."""
        used = self.options
        return f"q {tuple(self.q.shape)} in {self.dtype} over {_described(self.view)}" + (
            f" with {', '.join(used)}" if used else ""
        )


@dataclass(frozen=True)
class AppendInputs:
    """New tokens to write behind the keys of a view; made by :meth:`create`.

    Attributes:
        q: queries to rotate, ``[B, Hq, S, D]``, or None. Rotation gives a new tensor.
        k_new: ``[B, Hk, S, D]``; with ``new_offsets`` (then q and v_new too) ``[1, Hk, total, D]``.
        v_new: ``[B, Hv, S, Dv]``.
        view: where to. Its lengths are those before the append: token ``i`` of a sequence goes to
            slot ``kv_begin + kv_lengths + i``. Tokens beyond the capacity, or in a page out of
            range, are dropped.
        new_offsets: int32 ``[B + 1]`` or None, as ``CacheInputs.q_offsets``.
        max_new: most new tokens of a sequence: sizes grids and nothing else.
        rotary_cos, rotary_sin: ``[max_position, R / 2]`` or None: the first ``R`` columns of q and
            k_new are rotated by the angle of position ``kv_lengths + i``. Beyond the table the
            last row is taken.
        rotary_interleaved: pairs are columns ``(2i, 2i + 1)`` (GPT-J) and not ``(i, i + R / 2)``
            (GPT-NeoX).
    """

    q: Tensor | None
    k_new: Tensor
    v_new: Tensor
    view: KVView
    new_offsets: Tensor | None
    max_new: int
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool

    @classmethod
    def create(
        cls,
        k_new: Tensor,
        v_new: Tensor,
        view: KVView,
        *,
        q: Tensor | None = None,
        new_offsets: Tensor | None = None,
        max_new: int | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        rotary_interleaved: bool = False,
        layout: Layout = "bhsd",
    ) -> AppendInputs:
        """Check and normalise; shapes as ``layout`` says, packed ``[total, H, D]`` with offsets."""
        packed = new_offsets is not None
        k_new, _ = to_heads_first("k_new", k_new, layout, packed)
        v_new, _ = to_heads_first("v_new", v_new, layout, packed)
        check_floating("k_new", k_new, view.device)
        check_floating("v_new", v_new, view.device)
        stored = view.k.dtype if view.format is None else k_new.dtype
        for name, x in (("k_new", k_new), ("v_new", v_new)):
            if x.dtype != stored:
                raise TypeError(f"{name}.dtype must be {stored}, got {x.dtype}")
        tokens = k_new.shape[2]
        leading = 1 if packed else view.batch
        for name, x, heads, dim in (
            ("k_new", k_new, view.num_k_heads, view.head_dim),
            ("v_new", v_new, view.num_v_heads, view.value_head_dim),
        ):
            if x.shape != (leading, heads, tokens, dim):
                raise ValueError(
                    f"{name} must have shape {(leading, heads, tokens, dim)} as [B, H, S, D] "
                    f"({'packed, so B = 1' if packed else 'by the cache'}), got {tuple(x.shape)}"
                )
        new_offsets, max_new = resolve_offsets(
            "cu_seqlens", new_offsets, "max_seqlen", max_new, k_new, view.batch
        )
        if view.num_k_heads != view.num_v_heads and view.lengths_per_head:
            raise NotImplementedError(
                "append: lengths per head need as many value heads as key heads, got "
                f"{view.num_k_heads} key heads and {view.num_v_heads} value heads"
            )
        if q is not None:
            q, _ = to_heads_first("q", q, layout, packed)
            check_floating("q", q, view.device)
            if q.dtype != k_new.dtype or (q.shape[0], *q.shape[2:]) != (
                leading, tokens, view.head_dim,
            ):  # fmt: skip
                raise ValueError(
                    f"q must have k_new's dtype and shape {(leading, '.', tokens, view.head_dim)} "
                    f"as [B, Hq, S, D], got {q.dtype} {tuple(q.shape)}"
                )
        if (rotary_cos is None) != (rotary_sin is None):
            raise ValueError("rotary_cos and rotary_sin must be given together, got one of them")
        if rotary_cos is not None:
            _check_rotary(rotary_cos, rotary_sin, k_new)
            if view.lengths_per_head and q is not None:
                raise NotImplementedError(
                    "append: with lengths per head a query has no one position; rotate q and k_new "
                    "before the call"
                )
        view.check_slots(k_new.shape[2] if new_offsets is None else new_offsets)
        return cls(
            q, k_new, v_new, view, new_offsets, max_new, rotary_cos, rotary_sin,
            bool(rotary_interleaved),
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return self.k_new.dtype

    @property
    def device(self) -> torch.device:
        return self.view.device

    @property
    def head_dim(self) -> int:
        return self.view.head_dim

    @property
    def value_head_dim(self) -> int:
        return self.view.value_head_dim

    @property
    def requires_grad(self) -> bool:
        tensors = (self.q, self.k_new, self.v_new)
        return requires_grad(*tensors)

    @property
    def options(self) -> list[str]:
        return []

    @property
    def caches(self) -> list[str]:
        """Kinds of memory and packing, as ``Capabilities.caches`` has them."""
        return self.view.kinds + (["varlen"] if self.new_offsets is not None else [])

    def describe(self) -> str:
        """The call in words, for errors."""
        return f"append of k_new {tuple(self.k_new.shape)} to {_described(self.view)}"


def _described(view: KVView) -> str:
    return (
        f"{' '.join(view.kinds)} cache with k {tuple(view.k.shape)}, v {tuple(view.v.shape)} as "
        f"[P, H, page_size, D] on {view.device}"
    )


def to_heads_first(name: str, x: Tensor, layout: Layout, packed: bool) -> tuple[Tensor, Layout]:
    """``[B, H, S, D]`` view of a tensor in ``layout``, or packed ``[total, H, D]``; and the layout
    of an output of the same form."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    rank = 3 if packed else 4
    if x.dim() != rank:
        raise ValueError(
            f"{name} must have {rank} dimensions, got {x.dim()} (shape {tuple(x.shape)})"
        )
    if packed:
        return x.transpose(0, 1)[None], "bshd"
    return (x.transpose(1, 2) if layout == "bshd" else x), layout


def check_floating(name: str, x: Tensor, device: torch.device) -> None:
    """Dtype, device and last stride of a tensor of vectors."""
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name}.dtype must be one of {names}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}.device must equal the cache's ({device}), got {x.device}")
    if x.stride(3) != 1 and x.shape[3] > 1 and x.numel() > 0:
        raise ValueError(
            f"{name}.stride(-1) must be 1, got {x.stride(3)}; call {name}.contiguous() first"
        )


def resolve_offsets(
    name: str, offsets: Tensor | None, longest_name: str, longest: int | None, x: Tensor, batch: int
) -> tuple[Tensor | None, int]:
    """Checked int32 offsets of packed sequences, and the most tokens of one sequence.

    Args:
        name, longest_name: what the caller knows ``offsets`` and ``longest`` as.
        longest: a bound for the most tokens, or None to read it from the offsets.
        x: ``[1, H, total, D]``, or ``[B, H, S, D]`` without offsets.
    """
    tokens = x.shape[2]
    if offsets is None:
        if x.shape[0] != batch:
            raise ValueError(f"q.shape[0] must equal the cache's batch ({batch}), got {x.shape[0]}")
        return None, tokens
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        got = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {got}")
    if offsets.shape != (batch + 1,):
        raise ValueError(f"{name} must have shape ({batch + 1},), got {tuple(offsets.shape)}")
    if offsets.device != x.device:
        raise ValueError(f"{name}.device must be {x.device}, got {offsets.device}")
    if longest is not None:
        longest = as_int(longest_name, longest)
        if longest < 0:
            raise ValueError(f"{longest_name} must be non-negative, got {longest}")
    if _readable(offsets):
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
    return _to_int32(offsets), min(longest, tokens)


def _check_rotary(cos: Tensor, sin: Tensor, x: Tensor) -> None:
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(table, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(table).__name__}")
        if table.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name}.dtype must be float32 or {x.dtype}, got {table.dtype}")
        if table.device != x.device:
            raise ValueError(f"{name}.device must be {x.device}, got {table.device}")
        if table.dim() != 2 or table.shape[0] < 1 or not 2 <= 2 * table.shape[1] <= x.shape[3]:
            raise ValueError(
                f"{name} must have shape [max_position, R / 2] with R <= D ({x.shape[3]}), "
                f"got {tuple(table.shape)}"
            )
        if not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {table.stride()}")
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"rotary_sin must have the shape and dtype of rotary_cos ({tuple(cos.shape)}, "
            f"{cos.dtype}), got {tuple(sin.shape)}, {sin.dtype}"
        )
