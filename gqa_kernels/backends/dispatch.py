"""Which backend runs a call: the first in order that has no reason against it."""

from __future__ import annotations

import warnings

import torch

from ..inputs import AttentionInputs, HeadMapLike
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


def available_backends() -> list[str]:
    """Names of the backends usable on this machine now.

    ``cpu`` counts where its kernels are built or a C++ compiler is found; ``cuda`` where there is a
    GPU and its kernels are built or nvcc is found; ``triton`` where there is a GPU or its
    interpreter is on.
    """
    return [name for name, backend in BACKENDS.items() if backend.unavailable_reason() is None]


def explain(inputs: AttentionInputs) -> dict[str, list[str]]:
    """For every backend, in the order of ``auto``, why it can't run these inputs."""
    order = AUTO_ORDER.get(inputs.device.type, DEFAULT_ORDER)
    order = (*order, *(name for name in BACKENDS if name not in order))
    return {name: _reasons(BACKENDS[name], inputs) for name in order}


def explain_backend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_map: HeadMapLike, **options
) -> dict[str, list[str]]:
    """Why each backend can't run a call of :func:`gqa_kernels.asym_gqa_attention`.

    Args:
        q, k, v, head_map, options: as the call takes them (without ``backend`` and ``return_lse``).

    Returns:
        For every backend the list of reasons against it, in the order in which ``"auto"`` tries
        them: it takes the first whose list is empty.
    """
    return explain(AttentionInputs.create(q, k, v, head_map, **options))


def select(inputs: AttentionInputs, backend: str = "auto") -> Backend:
    """The backend that runs ``inputs``, ready to run.

    Raises:
        ValueError: no backend has that name.
        NotImplementedError: the named backend, or with ``"auto"`` every backend, can't run them.
    """
    if backend == "auto":
        for name in AUTO_ORDER.get(inputs.device.type, DEFAULT_ORDER):
            if not _reasons(BACKENDS[name], inputs) and _prepare(name) is None:
                return BACKENDS[name]
        raise NotImplementedError(
            f"no backend can run {_described(inputs)}:\n"
            + "\n".join(f"  {name}: {'; '.join(why)}" for name, why in explain(inputs).items())
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
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
    """Make a backend ready, once; warn where it should be but can't."""
    failure = BACKENDS[name].prepare()
    if failure:
        warnings.warn(f"gqa_kernels: backend {name!r} is not usable: {failure}", stacklevel=4)
    return failure


def _reasons(backend: Backend, inputs: AttentionInputs) -> list[str]:
    missing = _unavailable(backend.name)
    return ([missing] if missing else []) + backend.unsupported_reasons(inputs)


def _described(inputs: AttentionInputs) -> str:
    shapes = ", ".join(f"{n} {tuple(getattr(inputs, n).shape)}" for n in "qkv")
    used = inputs.options
    return f"{shapes} as [B, H, S, D] in {inputs.dtype} on {inputs.device}" + (
        f" with {', '.join(used)}" if used else ""
    )
