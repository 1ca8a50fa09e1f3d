"""Which backend runs a call: the first in order that has no reason against it."""

from __future__ import annotations

import warnings

import torch

from ..arguments import check_choice
from ..cache.inputs import AppendInputs, CacheInputs
from ..inputs import AttentionInputs
from .base import Backend
from .cpu import CPUBackend
from .cuda import CUDABackend
from .reference import ReferenceBackend
from .triton import TritonBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (CPUBackend(), CUDABackend(), TritonBackend(), ReferenceBackend())
}
# Triton's interpreter on CPU tensors is for tests: only an explicit backend="triton" takes it.
AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
DEFAULT_ORDER = ("reference",)

_failures: dict[str, str] = {}  # of backends that looked usable and could not be loaded
_warned: set[str] = set()  # reasons why the reference was taken that the user knows of

Inputs = AttentionInputs | CacheInputs | AppendInputs


def available_backends() -> list[str]:
    """Names of the backends usable on this machine now.

    ``cpu`` counts where its kernels are built or a C++ compiler is found; ``cuda`` where there is a
    GPU and its kernels are built or nvcc is found; ``triton`` where there is a GPU or its
    interpreter is on.
    """
    return [name for name, backend in BACKENDS.items() if backend.unavailable_reason() is None]


def explain(inputs: Inputs) -> dict[str, list[str]]:
    """For every backend, in the order of ``auto``, why it can't run these inputs."""
    order = AUTO_ORDER.get(inputs.device.type, DEFAULT_ORDER)
    order = (*order, *(name for name in BACKENDS if name not in order))
    reasons = {name: _reasons(BACKENDS[name], inputs) for name in order}
    for name, failure in _failures.items():
        if not reasons[name]:
            reasons[name] = [failure]
    return reasons


def select(inputs: Inputs, backend: str = "auto") -> Backend:
    """The backend that runs ``inputs``, ready to run.

    Raises:
        ValueError: no backend has that name.
        NotImplementedError: the named backend, or with ``"auto"`` every backend, can't run them.
    """
    if backend == "auto":
        passed_over = []
        for name in AUTO_ORDER.get(inputs.device.type, DEFAULT_ORDER):
            reasons = _reasons(BACKENDS[name], inputs)
            if not reasons:
                failure = _prepare(name)
                reasons = [failure] if failure else []
            if not reasons:
                if name == "reference" and passed_over:
                    _warn_of_reference(passed_over)
                return BACKENDS[name]
            passed_over.append((name, reasons))
        raise NotImplementedError(
            f"no backend can run {_described(inputs)}:\n"
            + "\n".join(f"  {name}: {'; '.join(why)}" for name, why in explain(inputs).items())
        )
    check_choice("backend", backend, ("auto", *BACKENDS))
    reasons = _reasons(BACKENDS[backend], inputs)
    if not reasons:
        failure = _prepare(backend)
        reasons = [failure] if failure else []
    if reasons:
        raise NotImplementedError(
            f"backend {backend!r} can't run {_described(inputs)}: {'; '.join(reasons)}"
        )
    return BACKENDS[backend]


def _constant_while_compiling(function):
    """``torch.compiler.assume_constant_result`` without its import of the whole compiler."""
    function._dynamo_marked_constant = True
    return function


@_constant_while_compiling
def _unavailable(name: str) -> str | None:
    return BACKENDS[name].unavailable_reason()


@_constant_while_compiling
def _prepare(name: str) -> str | None:
    """Load a backend's kernels. Returns None on success, else why it failed, which is a warning
    too: the backend looked usable."""
    failure = BACKENDS[name].prepare()
    _failures.pop(name, None)
    if failure:
        _failures[name] = failure
        warnings.warn(f"gqa_kernels: backend {name!r} is not usable: {failure}", stacklevel=4)
    return failure


def _warn_of_reference(passed_over: list[tuple[str, list[str]]]) -> None:
    """Say once per reason that ``backend="auto"`` fell back to the reference. Not while
    torch.compile traces, whose graphs a warning would break."""
    if torch.compiler.is_compiling():
        return
    why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in passed_over)
    if why in _warned:
        return
    _warned.add(why)
    warnings.warn(
        "gqa_kernels: backend='auto' runs the eager reference, which is slow and expands K and V, "
        f"because no fused backend can run this call ({why}). Change what the reasons name, or "
        "pass backend='reference' to choose it without this warning.",
        stacklevel=4,
    )


def _reasons(backend: Backend, inputs: Inputs) -> list[str]:
    missing = _unavailable(backend.name)
    if isinstance(inputs, AttentionInputs):
        why = backend.unsupported_reasons(inputs)
    else:
        why = backend.unsupported_cache_reasons(inputs)
    return ([missing] if missing else []) + why


def _described(inputs: Inputs) -> str:
    if not isinstance(inputs, AttentionInputs):
        return inputs.describe()
    shapes = ", ".join(f"{n} {tuple(getattr(inputs, n).shape)}" for n in "qkv")
    used = inputs.options
    return f"{shapes} as [B, H, S, D] in {inputs.dtype} on {inputs.device}" + (
        f" with {', '.join(used)}" if used else ""
    )
