"""What a backend is: capabilities as data, the reasons why it can't run a call, and the call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.inputs import AppendInputs, CacheInputs
from ..inputs import AttentionInputs

ALL_OPTIONS = frozenset(
    {
        "value_head_map",
        "window",
        "softcap",
        "alibi",
        "sinks",
        "bool_mask",
        "additive_mask",
        "kv_lengths",
        "device_map",
        "dropout",
        "mask_gradient",
        "torch_func",
    }
)
# Where keys and values may lie, and how they may be stored: the words of KVView.kinds, and
# "varlen" for packed queries or new tokens.
ALL_CACHES = frozenset(
    {"dense", "paged", "kv_begin", "varlen", "fp8_e4m3", "fp8_e5m2", "int8", "int4"}
)


# What backends with a backward op can't have: it is differentiated once, and in reverse.
FUSED_OPTIONS = ALL_OPTIONS - {"mask_gradient", "torch_func"}


@dataclass(frozen=True)
class Capabilities:
    """What a backend can run. Tests make their matrix from this.

    Attributes:
        devices: torch device types.
        dtypes: types of q, k and v.
        max_head_dim: largest D and Dv.
        options: names out of ``ALL_OPTIONS``. ``mask_gradient``: of an additive mask;
            ``torch_func``: derivatives by torch.func (grad, jvp, ...) or in forward mode.
        autograd: whether it has a backward.
        caches: names out of ``ALL_CACHES``, for attention over a cache and for the append.
        varlen_autograd: whether attention over packed sequences has a backward.
        cache_autograd: whether attention over any cache has one.
    """

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    max_head_dim: int
    options: frozenset[str]
    autograd: bool
    caches: frozenset[str] = frozenset()
    varlen_autograd: bool = False
    cache_autograd: bool = False

    def __post_init__(self) -> None:
        if not self.options <= ALL_OPTIONS:
            raise ValueError(f"options must be among {sorted(ALL_OPTIONS)}, got {self.options}")
        if not self.caches <= ALL_CACHES:
            raise ValueError(f"caches must be among {sorted(ALL_CACHES)}, got {self.caches}")


class Backend(ABC):
    """One implementation of asymmetric grouped-query attention."""

    name: str
    capabilities: Capabilities
    append_capabilities: Capabilities | None = None  # of appends to caches, where they differ

    def unavailable_reason(self) -> str | None:
        """Why this machine can't run the backend, or None. Cheap: imports and compiles nothing."""
        return None

    def prepare(self) -> str | None:
        """Make ready to run, compiling at first use where needed; the reason if that fails."""
        return self.unavailable_reason()

    def unsupported_reasons(self, inputs: AttentionInputs) -> list[str]:
        """Why the backend can't run these inputs; it can where the list is empty."""
        reasons = self._data_reasons(inputs, self.capabilities)
        if inputs.requires_grad and not self.capabilities.autograd:
            reasons.append("no backward, and an input requires grad")
        return reasons

    def unsupported_cache_reasons(self, inputs: CacheInputs | AppendInputs) -> list[str]:
        """The same for attention over a cache and for an append to one."""
        can = self.capabilities
        if isinstance(inputs, AppendInputs):
            can = self.append_capabilities or can
        if not can.caches:
            return ["attention over caches is not supported"]
        reasons = self._data_reasons(inputs, can)
        for kind in inputs.caches:
            if kind not in can.caches:
                reasons.append(f"cache kind {kind} is not supported")
        packed = isinstance(inputs, CacheInputs) and inputs.packed_kv is not None
        differentiable = can.cache_autograd or (packed and can.varlen_autograd)
        if inputs.requires_grad and not differentiable:
            reasons.append("no backward over a cache, and an input requires grad")
        return reasons

    @staticmethod
    def _data_reasons(
        inputs: AttentionInputs | CacheInputs | AppendInputs, can: Capabilities
    ) -> list[str]:
        """What the capabilities say against the device, dtype, head dims and options."""
        reasons = []
        if inputs.device.type not in can.devices:
            reasons.append(f"device {inputs.device.type} (supported: {_listed(can.devices)})")
        if inputs.dtype not in can.dtypes:
            supported = _listed(str(dtype).removeprefix("torch.") for dtype in can.dtypes)
            reasons.append(f"dtype {str(inputs.dtype).removeprefix('torch.')} ({supported} only)")
        for name, dim in (("D", inputs.head_dim), ("Dv", inputs.value_head_dim)):
            if dim > can.max_head_dim:
                reasons.append(f"head dim {name} = {dim} (at most {can.max_head_dim})")
        for option in inputs.options:
            if option not in can.options:
                reasons.append(f"option {option} is not supported")
        return reasons

    @abstractmethod
    def run(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Attention of inputs that the backend supports.

        Returns:
            out ``[B, Hq, Sq, Dv]`` in q's dtype (memory in the order of ``inputs.layout``), and the
            natural-log LSE, fp32 (fp64 for fp64 inputs), ``[B, Hq, Sq]``.
        """

    def run_cache(self, inputs: CacheInputs) -> tuple[Tensor, Tensor]:
        """Attention over a cache, with results as :meth:`run` has them; with ``q_offsets`` both
        have the leading dims of q, ``[1, Hq, total_q]``."""
        raise NotImplementedError(f"backend {self.name!r} has no attention over caches")

    def append(self, inputs: AppendInputs) -> Tensor | None:
        """Write new tokens into a cache.

        Returns:
            the queries after the rotary embedding, as ``inputs.q`` has them; None without any.
        """
        raise NotImplementedError(f"backend {self.name!r} has no append")


def empty_output(inputs: AttentionInputs) -> Tensor:
    """Uninitialised output, a ``[B, Hq, Sq, Dv]`` view of memory in the order of the layout."""
    return empty_output_like(inputs.q, inputs.value_head_dim, inputs.layout == "bshd")


def empty_output_like(q: Tensor, value_head_dim: int, bshd: bool) -> Tensor:
    """The same from a ``[B, Hq, Sq, D]`` query, for ops and their fake kernels."""
    batch, heads, q_len, _ = q.shape
    if bshd:
        return q.new_empty(batch, q_len, heads, value_head_dim).transpose(1, 2)
    return q.new_empty(batch, heads, q_len, value_head_dim)


def empty_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    need_slopes: bool,
    need_sinks: bool,
    batch: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dq, dk, dv, dslopes ``[B, Hq]`` and dsinks ``[Hq]``, the latter two fp32.
    ``batch`` is that of packed sequences."""
    heads = q.shape[1]
    batch = q.shape[0] if batch is None else batch
    dslopes = q.new_empty((batch, heads) if need_slopes else (0,), dtype=torch.float32)
    dsinks = q.new_empty((heads,) if need_sinks else (0,), dtype=torch.float32)
    return (*(x.new_empty(x.shape) for x in (q, k, v)), dslopes, dsinks)


def _listed(names) -> str:
    return ", ".join(sorted(names))
