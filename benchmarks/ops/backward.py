"""The backward op: gradients of q, k and v for an output gradient, of ours and of SDPA.

The forward that made the graph is not timed. What expand + SDPA must do per call is: its gradients
of the expanded K and V come down to the KV heads through the expansion's own backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.testing import assert_gradients_close

from ..data.cases import Case
from ..measure.roofline import Work
from ..peers.base import INTERPRETED, Contestant, Prepared, no_even_map
from ..peers.gpu import fa4_attention, fa4_missing
from ..peers.torch import SDPA_STORAGE, UNEVEN, sdpa_options
from .attention import Problem

PRODUCTS = 5 / 2  # S, dP, dV, dK and dQ for the forward's two
CHECKED_TOKENS = 48  # the gate's reference holds all scores many times over

Gradients = tuple[Tensor, Tensor, Tensor]


class BackwardProblem(Problem):
    """An attention problem with gradients of the output."""

    @cached_property
    def douts(self) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(1)
        return [
            torch.randn(q.shape, generator=generator, dtype=q.dtype, device=q.device)
            for q, _, _ in self.copies
        ]

    def short(self) -> BackwardProblem:
        """The same call on few tokens, for the gate."""
        length = min(CHECKED_TOKENS, self.case.q_len, self.case.kv_len)
        case = replace(self.case, q_len=length, kv_len=length)
        return BackwardProblem(case, [tuple(x[:, :, :length] for x in self.copies[0])])


def backward_work(case: Case) -> Work:
    """Reads q, k, v, out and dout, writes dq, dk and dv; five products for the forward's two."""
    forward = case.work
    return Work(bytes=2 * forward.bytes, flops=int(PRODUCTS * forward.flops))


class BackwardGate:
    """Holds gradients of the short problem to the tolerance rule; those timed must be finite."""

    def __init__(self, problem: BackwardProblem):
        self.short = problem.short()

    def check(self, gradients: Gradients) -> None:
        """Raises AssertionError, saying what is wrong, for a wrong result."""
        assert_gradients_close(
            dict(zip("qkv", gradients, strict=True)), *self.short.copies[0], self.short.head_map,
            dout=self.short.douts[0], **self.short.options,
        )  # fmt: skip


class _Differentiated(Contestant):
    """A forward function whose gradients are timed."""

    def forward(self, problem: BackwardProblem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        raise NotImplementedError

    def timed_forward(self, problem: BackwardProblem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The function to time. Controls override it to time another one than the gate checks."""
        return self.forward(problem)

    def prepare(self, problem: BackwardProblem) -> Prepared:
        runs = [
            _gradients(self.timed_forward(problem), tensors, dout)
            for tensors, dout in zip(problem.copies, problem.douts, strict=True)
        ]
        short = problem.short()
        checked = _gradients(self.forward(short), short.copies[0], short.douts[0])

        def result(gradients: Gradients) -> Gradients:
            assert all(x.isfinite().all() for x in gradients), "a gradient is not finite"
            return checked()

        return Prepared(lambda copy: runs[copy](), result)


class BackwardBackend(_Differentiated):
    """A backend of the package through autograd."""

    kind = "backend"

    def __init__(self, name: str):
        self.name = self.backend = name
        self.summary = f"gradients of asym_gqa_attention(..., backend={name!r})"

    def unavailable_reason(self, device: torch.device) -> str | None:
        backend = BACKENDS[self.backend]
        if not backend.capabilities.autograd:
            return "no backward"
        if device.type not in backend.capabilities.devices:
            return f"device {device.type}"
        if self.backend == "triton" and device.type == "cpu":
            return INTERPRETED
        return backend.unavailable_reason()

    def forward(self, problem: BackwardProblem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return self._with_map(problem, problem.head_map)

    def _with_map(
        self, problem: BackwardProblem, head_map: HeadMap
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        options = {"backend": self.backend, **problem.options}
        return lambda q, k, v: asym_gqa_attention(q, k, v, head_map, **options)

    def control(self) -> Contestant | None:
        return BackwardEven(self.backend)


class BackwardEven(BackwardBackend):
    """A backend's backward on equal groups of the same tensors."""

    kind = "control"

    def __init__(self, name: str):
        super().__init__(name)
        self.name = f"{name}, even map"
        self.summary += ", on equal groups of the same tensors"

    def unsupported_reason(self, problem: BackwardProblem) -> str | None:
        return no_even_map(problem.head_map)

    def timed_forward(self, problem: BackwardProblem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        heads = problem.head_map
        return self._with_map(problem, HeadMap.uniform(heads.num_heads, heads.num_kv_heads))

    def control(self) -> None:
        return None


class BackwardSdpa(_Differentiated):
    """SDPA on K and V expanded in each call, or as they are (even maps)."""

    def __init__(self, storage: str):
        self.name = self.storage = storage
        self.summary = f"backward of: {SDPA_STORAGE[storage]}"

    def unsupported_reason(self, problem: BackwardProblem) -> str | None:
        return UNEVEN if self.storage == "gqa-sdpa" and not problem.head_map.is_uniform else None

    def forward(self, problem: BackwardProblem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        options = sdpa_options(problem)
        if self.storage == "gqa-sdpa":
            return lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        index = problem.head_map.tensor(problem.device).long()
        return lambda q, k, v: scaled_dot_product_attention(
            q, k.index_select(1, index), v.index_select(1, index), **options
        )


class BackwardFlashAttention4(_Differentiated):
    """FlashAttention-4 on K and V expanded in each call, or as they are (even maps)."""

    def __init__(self, expand: bool):
        self.expand = expand
        self.name = "fa4-expand" if expand else "fa4-gqa"
        how = "K and V expanded in every call" if expand else "equal, contiguous groups only"
        self.summary = f"backward of FlashAttention-4; {how}"

    def unavailable_reason(self, device: torch.device) -> str | None:
        return "needs a CUDA GPU" if device.type != "cuda" else fa4_missing()

    def unsupported_reason(self, problem: BackwardProblem) -> str | None:
        if problem.case.torch_dtype not in (torch.float16, torch.bfloat16):
            return "fp16 and bf16 only"
        if problem.case.relative_bias:
            return "no additive mask"
        return None if self.expand or problem.head_map.is_uniform else UNEVEN

    def forward(self, problem: BackwardProblem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        index = problem.head_map.tensor(problem.device).long()

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.expand:
                k, v = k.index_select(1, index), v.index_select(1, index)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return fa4_attention(q, k, v, problem.case).transpose(1, 2)

        return attention


def backward_backends() -> dict[str, Contestant]:
    """Every backend of the package, by name."""
    return {name: BackwardBackend(name) for name in BACKENDS}


def backward_peers() -> dict[str, Contestant]:
    """SDPA with expansion and with ``enable_gqa``, and FlashAttention-4 likewise."""
    found = [BackwardSdpa(name) for name in ("expand+sdpa", "gqa-sdpa")]
    found += [BackwardFlashAttention4(expand) for expand in (True, False)]
    return {peer.name: peer for peer in found}


def _gradients(
    forward: Callable[[Tensor, Tensor, Tensor], Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    dout: Tensor,
) -> Callable[[], Gradients]:
    """A function that gives the gradients of a forward call made now."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = forward(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
