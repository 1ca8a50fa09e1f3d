"""What a backend is: capabilities as data, the reasons why it can't run a call, and the call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..call.append import AppendCall
from ..call.attention import AttentionCall
from ..call.auxiliary import AuxOutput, AuxRequest
from ..call.keep import KeepCall

Call = AttentionCall | AppendCall | KeepCall
Runner = Callable[[AttentionCall], tuple[Tensor, Tensor]]

Function = TypeVar("Function", bound=Callable[..., object])

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
        "batch_invariant",
        "varlen_mask",
        "varlen_dropout",
        "key_ranges",
        "mask_gradient",
        "torch_func",
    }
)
# Where keys and values may lie, and how they may be stored: the words of KVView.kinds, and
# "varlen" for packed queries or new tokens.
ALL_CACHES = frozenset(
    {"dense", "paged", "kv_begin", "varlen", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "k8v4"}
)


# What backends with a backward op can't have: it is differentiated once, and in reverse.
FUSED_OPTIONS = ALL_OPTIONS - {
    "mask_gradient", "torch_func", "batch_invariant", "varlen_mask", "varlen_dropout",
    "key_ranges",
}  # fmt: skip


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
    append_capabilities: Capabilities | None = None  # of appends and keep, if they differ

    def unavailable_reason(self) -> str | None:
        """Why this machine can't run the backend, or None. Cheap: imports and compiles nothing."""
        return None

    def prepare(self) -> str | None:
        """Load the kernels, compiling them on first use. Returns None on success, else a message
        that says why it failed."""
        return self.unavailable_reason()

    def unsupported(self, call: Call) -> list[str]:
        """Why the backend can't run a call; it can if the list is empty."""
        attends = isinstance(call, AttentionCall)
        can = (None if attends else self.append_capabilities) or self.capabilities
        memory = call.memory if isinstance(call, AttentionCall) else "cache"
        over_memory = memory != "dense"
        if over_memory and not can.caches:
            return ["attention over caches is not supported"]
        reasons = []
        if call.device.type not in can.devices:
            reasons.append(f"device {call.device.type} (supported: {_listed(can.devices)})")
        if call.dtype not in can.dtypes:
            supported = _listed(str(dtype).removeprefix("torch.") for dtype in can.dtypes)
            reasons.append(f"dtype {str(call.dtype).removeprefix('torch.')} ({supported} only)")
        for name, dim in (("D", call.head_dim), ("Dv", call.value_head_dim)):
            if dim > can.max_head_dim:
                reasons.append(f"head dim {name} = {dim} (at most {can.max_head_dim})")
        reasons += [f"option {name} is not supported" for name in call.used
                    if name not in can.options]  # fmt: skip
        reasons += [f"cache kind {kind} is not supported" for kind in call.kinds
                    if kind not in can.caches]  # fmt: skip
        if call.requires_grad:
            if not over_memory and not can.autograd:
                reasons.append("no backward, and an input requires grad")
            differentiable = can.cache_autograd or (memory == "packed" and can.varlen_autograd)
            if over_memory and not differentiable:
                reasons.append("no backward over a cache, and an input requires grad")
        return reasons

    @abstractmethod
    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Attention of a call that the backend supports.

        Returns:
            out ``[B, Hq, Sq, Dv]`` in q's dtype (in memory as ``call.bshd`` says), and the
            natural-log LSE, fp32 (fp64 for fp64 inputs), ``[B, Hq, Sq]``; of any content and shape
            if ``call.lse_wanted`` is false. With ``q_offsets`` both have the leading dims of q,
            ``[1, Hq, total_q]``.

        Raises:
            ValueError, TypeError, NotImplementedError: what :meth:`AttentionCall.check` says.
        """

    def runner(self, call: AttentionCall) -> Runner:
        """What runs calls of this one's kind, as :meth:`attend` does: a backend may prepare what
        these have in common. :func:`gqa_kernels.backends.dispatch.choose` keeps it by the kind."""
        return self.attend

    def attend_into(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        """:meth:`attend`, with the results in ``out [B, Hq, Sq, Dv]`` and ``lse [B, Hq, Sq]``. Here
        they are copied there; a backend may let its kernels write there."""
        results = self.attend(call)
        out.copy_(results[0])
        if lse is not None:
            lse.copy_(results[1])

    def fuses_auxiliary(self, call: AttentionCall) -> bool:
        """Whether :meth:`attend_with_auxiliary` can run a call that the backend supports."""
        return False

    def attend_with_auxiliary(
        self, call: AttentionCall, request: AuxRequest
    ) -> tuple[Tensor, AuxOutput]:
        """Out, as :meth:`attend` returns it, and what the request asks for, from the same kernels.

        Raises:
            NotImplementedError: :meth:`fuses_auxiliary` says no.
        """
        raise NotImplementedError(
            f"backend must be one whose kernels compute auxiliary outputs, got {self.name!r}"
        )

    @abstractmethod
    def append(self, call: AppendCall) -> Tensor | None:
        """Write new tokens into a cache.

        Returns:
            the queries after the rotary embedding, as ``call.q`` has them; None without any.

        Raises:
            ValueError, TypeError: what :meth:`AppendCall.check` says.
        """

    @abstractmethod
    def keep(self, call: KeepCall) -> None:
        """Move the kept keys of a cache to the front."""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def constant_while_compiling(function: Function) -> Function:
    """``torch.compiler.assume_constant_result`` without its import of the whole compiler."""
    function.__dict__["_dynamo_marked_constant"] = True
    return function
