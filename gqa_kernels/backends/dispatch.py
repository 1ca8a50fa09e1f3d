"""Which backend runs a call: the first in order that has no reason against it."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ..call.append import AppendCall
from ..call.attention import AttentionCall
from ..call.keep import KeepCall
from ..native.arguments import check_choice
from ..native.autograd import is_transformed_now
from .base import Backend, Call, Runner, constant_while_compiling
from .cpu import CPUBackend
from .cuda import CUDABackend
from .order import auto_order, is_decode
from .reference import ReferenceBackend
from .triton import TritonBackend


class Choice(NamedTuple):
    """What runs calls of a kind.

    Attributes:
        backend: ready to run.
        run: runs an attention call of this kind.
    """

    backend: Backend
    run: Runner


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (CPUBackend(), CUDABackend(), TritonBackend(), ReferenceBackend())
}

_failures: dict[str, str] = {}  # of backends that looked usable and could not be loaded
_warned: set[str] = set()  # warnings given so far about backends that could not run a call
# Choices made so far. What decides is the kind of a call: its key holds no size but the head dims
# (and, on a GPU, whether the call is decode), and no number's value. Only what can run is kept: it
# stays usable.
_choices: dict[tuple, Choice] = {}


def available_backends() -> list[str]:
    """Names of the backends usable on this machine now.

    ``cpu`` counts where its kernels are built or a C++ compiler is found; ``cuda`` where there is a
    GPU and its kernels are built or nvcc is found; ``triton`` where there is a GPU or its
    interpreter is on.

    Examples:
        >>> from gqa_kernels import available_backends
        >>> available_backends()[-1]
        'reference'
    """
    return [name for name, backend in BACKENDS.items() if backend.unavailable_reason() is None]


def explain(call: Call) -> dict[str, list[str]]:
    """For every backend, in the order of ``auto``, why it can't run a call."""
    order = auto_order(call)
    order = (*order, *(name for name in BACKENDS if name not in order))
    reasons = {name: _reasons(BACKENDS[name], call) for name in order}
    for name, failure in _failures.items():
        if not reasons[name]:
            reasons[name] = [failure]
    return reasons


def choose(call: AttentionCall, backend: str = "auto") -> Choice:
    """What runs an attention call: the backend that :func:`select` returns, and its runner. Kept
    for calls of the same kind.

    Raises:
        As :func:`select`.
    """
    # is_transformed_now(), written out: this runs at every call.
    is_transformed = forward_ad._current_level >= 0 or peek_interpreter_stack() is not None
    if is_transformed or is_compiling() or type(backend) is not str:
        return _choice(call, backend)
    q, k, v = call.q, call.kv.k, call.kv.v
    # What the choice, and what runs it, follow from.
    key = (
        call.kind, call.options.kind, backend, type(q), q.dtype, k.dtype, call.head_dims,
        (q.is_cpu and k.is_cpu and v.is_cpu) or (q.device, k.device, v.device, is_decode(call)),
        call.requires_grad, call.lse_wanted, call.bshd,
    )  # fmt: skip
    found = _choices.get(key)
    if found is None:
        found = _choices[key] = _choice(call, backend)
    return found


def select(call: Call, backend: str = "auto") -> Backend:
    """The backend that runs a call, ready to run. A choice is kept for calls of the same kind.

    Raises:
        ValueError, TypeError: ``call.check()`` refuses it, or no backend has that name.
        NotImplementedError: the named backend, or with ``"auto"`` every backend, can't run it.
    """
    if isinstance(call, AttentionCall):
        return choose(call, backend).backend
    uncached = type(backend) is not str or is_compiling() or is_transformed_now()
    if uncached or isinstance(call, KeepCall):
        return _choice(call, backend).backend
    key = _append_key(call, backend)
    found = _choices.get(key)
    if found is None:
        found = _choices[key] = _choice(call, backend)
    return found.backend


def _choice(call: Call, backend: str) -> Choice:
    call.check()
    chosen = _choose(call, backend)
    run = chosen.runner(call) if isinstance(call, AttentionCall) else chosen.attend
    return Choice(chosen, run)


def forget_choices() -> None:
    """Choose again at the next call of each kind (what a backend can run was changed)."""
    _choices.clear()


def _device_key(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> object:
    """All of the tensors' devices: the op of any meta tensor is the fake one, which computes
    nothing."""
    on_cpu = a.is_cpu and b.is_cpu and c.is_cpu and d.is_cpu
    return on_cpu or (a.device, b.device, c.device, d.device)


def _append_key(call: AppendCall, backend: str) -> tuple:
    """What the choice for an append follows from."""
    k_new, kv = call.k_new, call.kv
    q = k_new if call.q is None else call.q
    return (
        backend, "append", k_new.dtype, _device_key(kv.k, k_new, call.v_new, q), kv.k.dtype,
        kv.v.dtype, kv.k.shape[3], kv.v.shape[3],
        kv.page_table is None, kv.kv_begin is None, call.new_offsets is None, call.requires_grad,
    )  # fmt: skip


def _choose(call: Call, backend: str) -> Backend:
    if backend == "auto":
        passed_over: list[tuple[str, list[str]]] = []
        for name in auto_order(call):
            reasons = _reasons(BACKENDS[name], call)
            if not reasons:
                failure = _prepare(name)
                reasons = [failure] if failure else []
            if not reasons:
                if passed_over:
                    _warn(name, passed_over)
                return BACKENDS[name]
            passed_over.append((name, reasons))
        raise NotImplementedError(
            f"no backend can run {call.describe()}:\n"
            + "\n".join(f"  {name}: {'; '.join(why)}" for name, why in explain(call).items())
        )
    check_choice("backend", backend, ("auto", *BACKENDS))
    reasons = _reasons(BACKENDS[backend], call)
    if not reasons:
        failure = _prepare(backend)
        reasons = [failure] if failure else []
    if reasons:
        raise NotImplementedError(
            f"backend {backend!r} can't run {call.describe()}: {'; '.join(reasons)}"
        )
    return BACKENDS[backend]


@constant_while_compiling
def _unavailable(name: str) -> str | None:
    return BACKENDS[name].unavailable_reason()


@constant_while_compiling
def _prepare(name: str) -> str | None:
    """Load a backend's kernels. Returns None on success, else why it failed."""
    failure = BACKENDS[name].prepare()
    _failures.pop(name, None)
    if failure:
        _failures[name] = failure
    return failure


def _warn(chosen: str, passed_over: list[tuple[str, list[str]]]) -> None:
    """Say once per reason that ``backend="auto"`` fell back to the reference, or passed over a
    backend that looked usable and failed to load. Not while torch.compile traces, whose graphs a
    warning would break."""
    if is_compiling():
        return
    if chosen == "reference":
        why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in passed_over)
    else:
        failed = [name for name, _ in passed_over if name in _failures]
        why = "; ".join(f"{name!r} is not usable: {_failures[name]}" for name in failed)
    if not why or why in _warned:
        return
    _warned.add(why)
    if chosen != "reference":
        warnings.warn(f"gqa_kernels: backend {why}", stacklevel=6)
        return
    warnings.warn(
        "gqa_kernels: backend='auto' runs the eager reference, which is slow and expands K and V, "
        f"because no fused backend can run this call ({why}). Change what the reasons name, or "
        "pass backend='reference' to choose it without this warning.",
        stacklevel=6,
    )


def _reasons(backend: Backend, call: Call) -> list[str]:
    missing = _unavailable(backend.name)
    return ([missing] if missing else []) + backend.unsupported(call)
