"""Why each backend can or can't run a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .attention import asym_gqa_attention, attention_call
from .backends.dispatch import explain
from .cache.base import KVCache
from .call.append import AppendCall
from .call.attention import AttentionCall
from .call.keep import KeepCall
from .decode import append, asym_gqa_decode, decode_call, plan_decode
from .keep import keep
from .varlen import asym_gqa_varlen_attention, varlen_call

# No part in what a backend can run.
_NO_PART = ("backend", "return_lse", "out", "lse", "deterministic", "advance")
_OF_APPEND = (
    "k_new", "v_new", "rotary_cos", "rotary_sin", "rotary_interleaved", "rotary_positions",
)  # fmt: skip


def explain_backend(function: Callable, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
    """Why each backend can't run a call of a public function.

    Args:
        function: :func:`gqa_kernels.asym_gqa_attention`, :func:`~gqa_kernels.asym_gqa_decode`,
            :func:`~gqa_kernels.asym_gqa_varlen_attention`, :func:`~gqa_kernels.plan_decode`, or a
            cache's ``append`` or ``keep``.
        args, kwargs: as the function takes them. Nothing is computed or written. ``backend``,
            ``return_lse``, ``out``, ``lse``, ``deterministic`` and ``advance`` are not looked at.

    Returns:
        For every backend the list of reasons against it, in the order in which ``"auto"`` tries
        them: it takes the first whose list is empty.

    Raises:
        ValueError, TypeError: as the function does for malformed arguments.

    Examples:
        >>> import torch
        >>> from gqa_kernels import asym_gqa_attention, explain_backend
        >>> q, k, v = (torch.randn(1, heads, 8, 16, dtype=torch.float64) for heads in (3, 2, 2))
        >>> explain_backend(asym_gqa_attention, q, k, v, [0, 0, 1])["reference"]
        []
    """
    kwargs = {name: x for name, x in kwargs.items() if name not in _NO_PART}
    if getattr(function, "__func__", function) is append:
        return _explain_append(getattr(function, "__self__", None), *args, **kwargs)
    if getattr(function, "__func__", function) is keep:
        return _explain_keep(getattr(function, "__self__", None), *args, **kwargs)
    if function not in _CALLS:
        names = ", ".join(known.__name__ for known in _CALLS)
        raise TypeError(
            f"function must be one of {names} or a cache's append or keep, got {function!r}"
        )
    new = {name: kwargs.pop(name) for name in _OF_APPEND if name in kwargs}
    call = _CALLS[function](*args, **kwargs)
    call.check()
    reasons = explain(call)
    if new.get("k_new") is not None:
        append_call = AppendCall.create(
            new.pop("k_new"), new.pop("v_new", None), call.kv, layout=kwargs.get("layout", "bhsd"),
            cu_seqlens=kwargs.get("cu_seqlens_q"), max_seqlen=kwargs.get("max_seqlen_q"),
            q_heads_first=call.q, next_positions=_cache_of(*args, **kwargs).next_positions, **new,
        )  # fmt: skip
        for name, why in explain(append_call).items():
            reasons[name] += [f"append: {reason}" for reason in why if reason not in reasons[name]]
    return reasons


def _explain_append(cache: KVCache | None, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
    of, k_new, v_new = args if cache is None else (cache, *args)
    call = AppendCall.create(
        k_new, v_new, of.view(), next_positions=of.next_positions, **kwargs
    )  # fmt: skip
    call.check()
    return explain(call)


def _explain_keep(cache: KVCache | None, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
    of, *kept = args if cache is None else (cache, *args)
    return explain(KeepCall.create(of.view(), *kept, **kwargs)[0])


def _cache_of(q: object, cache: KVCache, *_: object, **__: object) -> KVCache:
    """The cache of a decode call's arguments."""
    return cache


_CALLS: dict[Callable[..., Any], Callable[..., AttentionCall]] = {
    asym_gqa_attention: attention_call,
    asym_gqa_decode: decode_call,
    asym_gqa_varlen_attention: varlen_call,
    plan_decode: decode_call,
}
