"""AttentionInputs: a checked, normalised attention call. Every error a user can cause is here."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from .autograd import is_transformed, requires_grad
from .dropout import draw_seed
from .head_map import HeadMap

HeadMapLike = HeadMap | Sequence[int] | Tensor
Layout = Literal["bhsd", "bshd"]

LAYOUTS = ("bhsd", "bshd")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNBOUNDED = -1  # a window side without limit
MAX_WINDOW = 1 << 30  # beyond any length, and no 32-bit position overflows by adding it


@dataclass(frozen=True)
class AttentionInputs:
    """One call in the form that backends take; made by :meth:`create`.

    Attributes:
        q: ``[B, Hq, Sq, D]``. This and all below are views, whatever ``layout`` the caller used.
        k: ``[B, Hk, Sk, D]``.
        v: ``[B, Hv, Sk, Dv]``.
        head_map: a HeadMap where the host can read it, else an integer tensor ``[Hq]``.
        value_head_map: the same for V; None where V follows ``head_map``.
        scale: factor of the scores.
        window_left: keys visible before the query's position, or -1 for all of them.
        window_right: keys visible after it (0 where causal), or -1 for all of them.
        softcap: cap of the scores, 0.0 for none.
        alibi_slopes: fp32 ``[B, Hq]`` or None.
        sinks: fp32 ``[Hq]`` or None.
        attn_mask: boolean or floating ``[B, Hq, Sq, Sk]`` (strides may be 0) or None.
        kv_lengths: int32 ``[B, Hk]`` (strides may be 0) or None.
        layout: memory order of the output, ``"bhsd"`` or ``"bshd"``.
        deterministic: results must be bitwise repeatable.
        dropout_p: part of the probabilities that is dropped.
        dropout_seed: int64 ``[2]``, seed and offset (see :mod:`gqa_kernels.dropout`), or None
            where nothing is dropped.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    head_map: HeadMap | Tensor
    value_head_map: HeadMap | Tensor | None
    scale: float
    window_left: int
    window_right: int
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    attn_mask: Tensor | None
    kv_lengths: Tensor | None
    layout: Layout
    deterministic: bool
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None

    @classmethod
    def create(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        head_map: HeadMapLike,
        *,
        value_head_map: HeadMapLike | None = None,
        causal: bool = False,
        scale: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        attn_mask: Tensor | None = None,
        kv_lengths: Tensor | Sequence[int] | None = None,
        layout: Layout = "bhsd",
        deterministic: bool = False,
        dropout_p: float = 0.0,
    ) -> AttentionInputs:
        """Check and normalise the arguments of :func:`gqa_kernels.asym_gqa_attention`."""
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        _check_tensors(q, k, v)
        head_axis = 1
        if layout == "bshd":
            head_axis = 2
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        _check_shapes(q, k, v, head_axis)
        if value_head_map is None and k.shape[1] != v.shape[1]:
            raise ValueError(
                f"v.shape[{head_axis}] must equal k.shape[{head_axis}] ({k.shape[1]}) where no "
                f"value_head_map is given, got {v.shape[1]}"
            )
        k_map = _resolve_map("head_map", head_map, q, k.shape[1], f"k.shape[{head_axis}]")
        v_map = None
        if value_head_map is not None:
            name = f"v.shape[{head_axis}]"
            v_map = _resolve_map("value_head_map", value_head_map, q, v.shape[1], name)
        window_left, window_right = _resolve_window(window, causal)
        return cls(
            q=q,
            k=k,
            v=v,
            head_map=k_map,
            value_head_map=v_map,
            scale=_resolve_scale(scale, q.shape[3]),
            window_left=window_left,
            window_right=window_right,
            softcap=_resolve_softcap(softcap),
            alibi_slopes=_resolve_slopes(alibi_slopes, q),
            sinks=_resolve_sinks(sinks, q),
            attn_mask=_resolve_mask(attn_mask, q, k.shape[2]),
            kv_lengths=_resolve_lengths(kv_lengths, q, k),
            layout=layout,
            deterministic=bool(deterministic),
            dropout_p=_resolve_dropout(dropout_p),
        )

    def with_dropout_seed(self) -> AttentionInputs:
        """The call with a seed from torch's default generator, if it drops anything."""
        if self.dropout_p == 0.0:
            return self
        return replace(self, dropout_seed=draw_seed(self.q.device))

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def num_k_heads(self) -> int:
        return self.k.shape[1]

    @property
    def num_v_heads(self) -> int:
        return self.v.shape[1]

    @property
    def q_len(self) -> int:
        return self.q.shape[2]

    @property
    def kv_len(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def value_head_dim(self) -> int:
        return self.v.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def head_map_tensor(self) -> Tensor:
        """The key head map as an integer tensor ``[Hq]`` on the call's device."""
        return _map_tensor(self.head_map, self.q.device)

    @property
    def value_head_map_tensor(self) -> Tensor | None:
        """The value head map likewise, or None where V follows the key head map."""
        if self.value_head_map is None:
            return None
        return _map_tensor(self.value_head_map, self.q.device)

    @property
    def requires_grad(self) -> bool:
        tensors = (self.q, self.k, self.v, self.alibi_slopes, self.sinks, self.attn_mask)
        return requires_grad(*tensors)

    @property
    def options(self) -> list[str]:
        """Names of the options in use, as :class:`~gqa_kernels.backends.base.Capabilities` has."""
        used = []
        if self.value_head_map is not None:
            used.append("value_head_map")
        if self.window_left != UNBOUNDED or self.window_right != UNBOUNDED:
            used.append("window")
        if self.softcap:
            used.append("softcap")
        if self.alibi_slopes is not None:
            used.append("alibi")
        if self.sinks is not None:
            used.append("sinks")
        if self.attn_mask is not None:
            used.append("bool_mask" if self.attn_mask.dtype == torch.bool else "additive_mask")
        if self.kv_lengths is not None:
            used.append("kv_lengths")
        if isinstance(self.head_map, Tensor) or isinstance(self.value_head_map, Tensor):
            used.append("device_map")
        if self.dropout_p:
            used.append("dropout")
        if requires_grad(self.attn_mask):
            used.append("mask_gradient")
        if is_transformed(self.q, self.k, self.v, self.alibi_slopes, self.sinks, self.attn_mask):
            used.append("torch_func")
        return used


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Type, rank, dtype, device and last stride of q, k and v."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {x.dim()} (shape {_shape(x)})")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}.dtype must be one of {_names(DTYPES)}, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}.dtype must equal q.dtype ({q.dtype}), got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}.device must equal q.device ({q.device}), got {x.device}")
        if x.stride(3) != 1 and x.shape[3] > 1 and x.numel() > 0:
            raise ValueError(
                f"{name}.stride(-1) must be 1, got {x.stride(3)}; call {name}.contiguous() first"
            )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, head_axis: int) -> None:
    """Sizes of the bhsd views; ``head_axis`` is where the caller's layout has the heads."""
    token_axis = 3 - head_axis
    batch, q_heads, _, head_dim = q.shape
    k_batch, k_heads, kv_len, k_head_dim = k.shape
    v_batch, v_heads, v_len, value_head_dim = v.shape
    if k_batch != batch:
        raise ValueError(f"k.shape[0] must equal q.shape[0] ({batch}), got {k_batch}")
    if v_batch != batch:
        raise ValueError(f"v.shape[0] must equal q.shape[0] ({batch}), got {v_batch}")
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
    if head_dim < 1 or value_head_dim < 1:
        raise ValueError(
            f"q and v.shape[3] (head dim) must be at least 1, got {head_dim} and {value_head_dim}"
        )


def _readable(x: Tensor) -> bool:
    """Whether the host can look at the values without waiting for a device or breaking a graph."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    )


def as_int(name: str, value: object) -> int:
    """An integer option: a Python or numpy integer, or a 0-d integer tensor that the host can read.
    A SymInt of torch.compile stays one."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, Tensor) and not (
        value.dim() == 0 and _readable(value) and not value.dtype.is_floating_point
        and not value.dtype.is_complex and value.dtype != torch.bool
    ):  # fmt: skip
        raise TypeError(
            f"{name} must be an integer, or a 0-d integer tensor on the CPU, got a {value.dtype} "
            f"tensor of shape {_shape(value)} on {value.device}"
        )
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer, got {_shown(value)}")


def _to_int32(x: Tensor) -> Tensor:
    """Integers as int32. A value beyond 32 bits stays out of range: it doesn't wrap into it."""
    return x if x.dtype == torch.int32 else x.clamp(-(2**31), 2**31 - 1).to(torch.int32)


@lru_cache(maxsize=1024)
def _interned_map(entries: tuple[int, ...], num_kv_heads: int) -> HeadMap:
    """One HeadMap per content, so that plans cached on it are found again."""
    return HeadMap(entries, num_kv_heads)


def _resolve_map(
    name: str, value: HeadMapLike, q: Tensor, num_kv_heads: int, shape_name: str
) -> HeadMap | Tensor:
    num_heads = q.shape[1]
    if isinstance(value, Tensor):
        if value.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
            raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")
        if value.dim() != 1:
            raise ValueError(f"{name} must have 1 dimension, got {value.dim()} {_shape(value)}")
        if value.numel() != num_heads:
            raise ValueError(
                f"{name} must have one entry per query head ({num_heads}), got {value.numel()}"
            )
        if not _readable(value):
            if value.device != q.device:
                raise ValueError(
                    f"{name}.device must equal q.device ({q.device}), got {value.device}"
                )
            return value
        value = value.tolist()
    if not isinstance(value, HeadMap):
        if hasattr(value, "tolist"):  # a numpy array
            value = value.tolist()
        if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            raise TypeError(
                f"{name} must be a HeadMap, a sequence of integers or an integer tensor, "
                f"got {type(value).__name__}"
            )
        entries = tuple(value)
        if not all(type(e) is int for e in entries):
            entries = HeadMap(entries).entries  # converts numpy integers, refuses the rest
        if entries and not (min(entries) >= 0 and max(entries) < num_kv_heads):
            head = next(h for h, e in enumerate(entries) if not 0 <= e < num_kv_heads)
            raise ValueError(
                f"{name} entries must lie in [0, {shape_name} ({num_kv_heads})), "
                f"got {entries[head]} at head {head}"
            )
        value = _interned_map(entries, num_kv_heads)
    if value.num_heads != num_heads:
        raise ValueError(
            f"{name} must have one entry per query head ({num_heads}), got {value.num_heads}"
        )
    if value.num_kv_heads != num_kv_heads:
        raise ValueError(
            f"{shape_name} must equal {name}.num_kv_heads ({value.num_kv_heads}), "
            f"got {num_kv_heads}"
        )
    return value


def _map_tensor(head_map: HeadMap | Tensor, device: torch.device) -> Tensor:
    return head_map.tensor(device) if isinstance(head_map, HeadMap) else head_map


def _resolve_window(window: object, causal: bool) -> tuple[int, int]:
    left = right = UNBOUNDED
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ValueError(f"window must be a pair (left, right) or None, got {window!r}")
        for side, size in zip(("left", "right"), window, strict=True):
            if size is None:
                continue
            if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
                raise TypeError(f"window {side} must be an integer or None, got {size!r}")
            if size < 0:
                raise ValueError(
                    f"window {side} must be non-negative, or None for unbounded, got {size}"
                )
        left, right = (UNBOUNDED if size is None else min(size, MAX_WINDOW) for size in window)
    return left, 0 if causal else right


def _resolve_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    scale = float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return scale


def _resolve_softcap(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    softcap = float(softcap)
    if not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    return softcap


def _resolve_dropout(dropout_p: float) -> float:
    dropout_p = float(dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    return dropout_p


def _check_float_tensor(name: str, x: object, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}.dtype must be floating, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}.device must equal q.device ({q.device}), got {x.device}")


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of scores and softmax: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _resolve_slopes(slopes: Tensor | None, q: Tensor) -> Tensor | None:
    if slopes is None:
        return None
    _check_float_tensor("alibi_slopes", slopes, q)
    batch, heads = q.shape[:2]
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), got {_shape(slopes)}"
        )
    return slopes.to(_accumulate_dtype(q.dtype)).expand(batch, heads)


def _resolve_sinks(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    _check_float_tensor("sinks", sinks, q)
    if sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must have shape ({q.shape[1]},), got {_shape(sinks)}")
    return sinks.to(_accumulate_dtype(q.dtype))


def _resolve_mask(mask: Tensor | None, q: Tensor, kv_len: int) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        if not mask.dtype.is_floating_point:
            raise TypeError(f"attn_mask.dtype must be bool or floating, got {mask.dtype}")
        if mask.dtype not in (q.dtype, torch.float32):
            mask = mask.to(_accumulate_dtype(q.dtype))
    if mask.device != q.device:
        raise ValueError(f"attn_mask.device must equal q.device ({q.device}), got {mask.device}")
    target = (*q.shape[:3], kv_len)
    have = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or any(h not in (1, t) for h, t in zip(have, target, strict=True)):
        raise ValueError(
            f"attn_mask must broadcast to [B, Hq, Sq, Sk] = {target}, got {_shape(mask)}"
        )
    return mask.expand(target)


def _resolve_lengths(lengths: Tensor | Sequence[int] | None, q: Tensor, k: Tensor) -> Tensor | None:
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, device=q.device)
        if lengths.numel() == 0:
            lengths = lengths.to(torch.int32)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"kv_lengths.dtype must be int32 or int64, got {lengths.dtype}")
    if lengths.device != q.device:
        raise ValueError(
            f"kv_lengths.device must equal q.device ({q.device}), got {lengths.device}"
        )
    batch, heads, kv_len = k.shape[:3]
    if lengths.shape not in ((batch,), (batch, heads)):
        raise ValueError(
            f"kv_lengths must have shape ({batch},) or ({batch}, {heads}), got {_shape(lengths)}"
        )
    if _readable(lengths) and lengths.numel():
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > kv_len:
            raise ValueError(
                f"kv_lengths must lie in [0, Sk ({kv_len})], got {low if low < 0 else high}"
            )
    lengths = _to_int32(lengths)
    return (lengths[:, None] if lengths.dim() == 1 else lengths).expand(batch, heads)


def _shown(value: object) -> str:
    """A value as an error shows it: never long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
