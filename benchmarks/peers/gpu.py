"""Peers that need a GPU: FlashAttention-3 and -4, FlashInfer, torch's varlen attention.

Each is imported when it is first requested; a missing one reports that it is not installed.
FlashAttention-4 is ``flash-attn-4`` (the CuTe DSL's ``flash_attn.cute``), which compiles kernels at
the first call of a shape. It has no split-KV on sm_90, so there it is a peer of prefill and
training only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from ..data.cases import Case
from ..ops.attention import Problem
from .base import UNEVEN, Contestant, Prepared
from .torch import rows_unsupported

FA3_MODULES = {  # module to import -> namespace of its op "fwd"
    "flash_attn_3._C": "flash_attn_3",
    "fa3_fwd_interface": "fa3_fwd",
    "vllm.vllm_flash_attn._vllm_fa3_C": "_vllm_fa3_C",
    "_vllm_fa3_C": "_vllm_fa3_C",
}
FLASHINFER_PAGE = 16
FLASHINFER_WORKSPACE = 128 << 20  # bytes, as its documentation asks for


class GpuPeer(Contestant):
    """A peer that one function prepares.

    Args:
        library: None if present, or why not.
        prepare: as :meth:`Contestant.prepare`.
        unsupported: as :meth:`Contestant.unsupported_reason`.
    """

    def __init__(
        self,
        name: str,
        summary: str,
        library: Callable[[], str | None],
        prepare: Callable[[Problem], Prepared],
        unsupported: Callable[[Problem], str | None] = lambda problem: None,
    ):
        self.name, self.summary = name, summary
        self._library, self._prepare, self._unsupported = library, prepare, unsupported

    def unavailable_reason(self, device: torch.device) -> str | None:
        return "needs a CUDA GPU" if device.type != "cuda" else self._library()

    def unsupported_reason(self, problem: Problem) -> str | None:
        if problem.case.torch_dtype not in (torch.float16, torch.bfloat16):
            return "fp16 and bf16 only"
        if problem.case.relative_bias:
            return "no additive mask"
        return self._unsupported(problem)

    def prepare(self, problem: Problem) -> Prepared:
        return self._prepare(problem)


def gpu_peers() -> list[Contestant]:
    rows = "each (sequence, KV head) a sequence whose queries are the group's heads; decode only"
    return [
        GpuPeer(
            "fa3-expanded",
            "FlashAttention-3 on a cache kept expanded, not timed",
            _fa3_reason,
            partial(_fa3_dense, expand=True),
        ),
        GpuPeer(
            "fa3-gqa",
            "FlashAttention-3; equal, contiguous groups only",
            _fa3_reason,
            partial(_fa3_dense, expand=False),
            _even,
        ),
        GpuPeer("fa3-rows", f"FlashAttention-3: {rows}", _fa3_reason, _fa3_rows, rows_unsupported),
        GpuPeer(
            "fa3-batch-index",
            "FlashAttention-3: each (sequence, query head) a sequence that points to its KV head; "
            "decode only",
            _fa3_reason,
            _fa3_batch_index,
            rows_unsupported,
        ),
        GpuPeer(
            "fa4-expanded",
            "FlashAttention-4 on a cache kept expanded, not timed",
            fa4_missing,
            partial(_fa4_dense, expand=True),
        ),
        GpuPeer(
            "fa4-gqa",
            "FlashAttention-4; equal, contiguous groups only",
            fa4_missing,
            partial(_fa4_dense, expand=False),
            _even,
        ),
        GpuPeer("fa4-rows", f"FlashAttention-4: {rows}", fa4_missing, _fa4_rows, rows_unsupported),
        GpuPeer(
            "varlen-rows",
            f"torch's varlen attention: {rows}",
            partial(_missing, "torch.nn.attention.varlen"),
            _varlen_rows,
            rows_unsupported,
        ),
        GpuPeer(
            "flashinfer-rows",
            f"FlashInfer's paged prefill, pages of {FLASHINFER_PAGE}: {rows}",
            partial(_missing, "flashinfer"),
            _flashinfer_rows,
            lambda problem: rows_unsupported(problem) or _paged(problem),
        ),
    ]


@cache
def _missing(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"import {module}: {error}"
    return None


@cache
def _fa3_reason() -> str | None:
    reasons = [_missing(module) for module in FA3_MODULES]
    return "; ".join(reasons) if all(reasons) else None


def fa4_missing() -> str | None:
    return _missing("flash_attn.cute")


def fa4_attention(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    """FlashAttention-4 on ``[B, S, H, D]``."""
    from flash_attn.cute import flash_attn_func

    window = (None, None) if case.window is None else (case.window, 0)
    causal = case.causal and case.window is None  # a window that ends at 0 is causal
    return _only_out(flash_attn_func(q, k, v, causal=causal, window_size=window))


def _only_out(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """FlashAttention-4 gives the LSE, or None, beside the output; its first betas did not."""
    return result[0] if isinstance(result, tuple) else result


def _fa3() -> Callable[..., list[Tensor]]:
    module = next(module for module in FA3_MODULES if _missing(module) is None)
    return getattr(torch.ops, FA3_MODULES[module]).fwd


def _even(problem: Problem) -> str | None:
    return None if problem.head_map.is_uniform else UNEVEN


def _paged(problem: Problem) -> str | None:
    if problem.case.kv_len % FLASHINFER_PAGE:
        return f"contexts that are a multiple of {FLASHINFER_PAGE} only"
    return None


def _fa3_dense(problem: Problem, expand: bool) -> Prepared:
    """q, k and v as ``[B, S, H, D]``, K and V expanded to all query heads or as they are."""
    forward, case = _fa3(), problem.case
    inputs = problem.expanded if expand else problem.copies
    inputs = [tuple(x.transpose(1, 2).contiguous() for x in copy) for copy in inputs]
    options = {"softmax_scale": case.head_dim**-0.5, "is_causal": case.causal}
    if case.window is not None:
        options |= {"window_size_left": case.window, "window_size_right": 0, "is_causal": False}
    return Prepared(
        lambda copy: forward(*inputs[copy], **options)[0], lambda out: out.transpose(1, 2)
    )


def _fa4_dense(problem: Problem, expand: bool) -> Prepared:
    """As :func:`_fa3_dense`; both align a causal mask to the last key."""
    inputs = problem.expanded if expand else problem.copies
    inputs = [tuple(x.transpose(1, 2).contiguous() for x in copy) for copy in inputs]
    return Prepared(
        lambda copy: fa4_attention(*inputs[copy], problem.case), lambda out: out.transpose(1, 2)
    )


def _fa4_rows(problem: Problem) -> Prepared:
    from flash_attn.cute import flash_attn_varlen_func

    inputs, starts, order, largest = _as_rows(problem)
    dim, kv_len = problem.case.head_dim, problem.case.kv_len
    inputs = [(q, k.reshape(-1, 1, dim), v.reshape(-1, 1, dim)) for q, k, v in inputs]
    key_starts = torch.arange(len(starts), device=problem.device, dtype=torch.int32) * kv_len

    def run(copy: int) -> Tensor:
        return _only_out(
            flash_attn_varlen_func(
                *inputs[copy], cu_seqlens_q=starts, cu_seqlens_k=key_starts,
                max_seqlen_q=largest, max_seqlen_k=kv_len,
            )
        )  # fmt: skip

    return Prepared(run, _from_rows(problem, order))


def _as_rows(problem: Problem) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor, Tensor, int]:
    """Each (sequence, KV head) as a sequence of one head.

    Returns:
        per copy q ``[B * Hq, 1, D]`` in the order of the groups and k, v ``[B * Hkv, Sk, 1, D]``;
        first query of each sequence ``[B * Hkv + 1]`` int32; the order; the largest group.
    """
    groups = problem.head_map.groups
    order = torch.tensor([h for group in groups for h in group], device=problem.device)
    dim, kv_len = problem.case.head_dim, problem.case.kv_len
    inputs = [
        (
            q[:, order].reshape(-1, 1, dim),
            k.reshape(-1, kv_len, 1, dim),
            v.reshape(-1, kv_len, 1, dim),
        )
        for q, k, v in problem.copies
    ]
    sizes = torch.tensor([0, *map(len, groups * problem.case.batch)])
    starts = sizes.cumsum(0).to(problem.device, torch.int32)
    return inputs, starts, order, max(map(len, groups))


def _from_rows(problem: Problem, order: Tensor) -> Callable[[Tensor], Tensor]:
    shape = problem.copies[0][0].shape
    return lambda out: out.reshape(shape)[:, order.argsort()]


def _fa3_rows(problem: Problem) -> Prepared:
    forward, case = _fa3(), problem.case
    inputs, starts, order, largest = _as_rows(problem)
    lengths = torch.full((len(starts) - 1,), case.kv_len, dtype=torch.int32, device=problem.device)

    def run(copy: int) -> Tensor:
        return forward(
            *inputs[copy], cu_seqlens_q=starts, seqused_k=lengths, max_seqlen_q=largest,
            softmax_scale=case.head_dim**-0.5,
        )[0]  # fmt: skip

    return Prepared(run, _from_rows(problem, order))


def _fa3_batch_index(problem: Problem) -> Prepared:
    forward, case, heads = _fa3(), problem.case, problem.head_map
    inputs, _, _, _ = _as_rows(problem)
    inputs = [
        (q.reshape(-1, 1, 1, case.head_dim), k, v)
        for (q, _, _), (_, k, v) in zip(problem.copies, inputs, strict=True)
    ]
    sequence = torch.arange(case.batch, device=problem.device)[:, None] * heads.num_kv_heads
    index = (sequence + heads.tensor(problem.device)).flatten().int()
    lengths = torch.full_like(index, case.kv_len)

    def run(copy: int) -> Tensor:
        return forward(
            *inputs[copy], seqused_k=lengths, kv_batch_idx=index, softmax_scale=case.head_dim**-0.5
        )[0]

    return Prepared(run, lambda out: out.reshape(problem.copies[0][0].shape))


def _varlen_rows(problem: Problem) -> Prepared:
    from torch.nn.attention.varlen import varlen_attn

    inputs, starts, order, largest = _as_rows(problem)
    dim, kv_len = problem.case.head_dim, problem.case.kv_len
    inputs = [(q, k.reshape(-1, 1, dim), v.reshape(-1, 1, dim)) for q, k, v in inputs]
    key_starts = torch.arange(len(starts), device=problem.device, dtype=torch.int32) * kv_len

    def run(copy: int) -> Tensor:
        return varlen_attn(*inputs[copy], starts, key_starts, largest, kv_len)

    return Prepared(run, _from_rows(problem, order))


def _flashinfer_rows(problem: Problem) -> Prepared:
    import flashinfer

    inputs, starts, order, _ = _as_rows(problem)
    case, sequences = problem.case, len(starts) - 1
    pages = case.kv_len // FLASHINFER_PAGE
    paged = [
        (q, tuple(x.reshape(-1, FLASHINFER_PAGE, 1, case.head_dim) for x in (k, v)))
        for q, k, v in inputs
    ]
    device = problem.device
    workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        starts,
        torch.arange(sequences + 1, device=device, dtype=torch.int32) * pages,
        torch.arange(sequences * pages, device=device, dtype=torch.int32),
        torch.full((sequences,), FLASHINFER_PAGE, device=device, dtype=torch.int32),
        1,
        1,
        case.head_dim,
        FLASHINFER_PAGE,
        causal=False,
        q_data_type=case.torch_dtype,
        kv_data_type=case.torch_dtype,
    )
    return Prepared(lambda copy: wrapper.run(*paged[copy]), _from_rows(problem, order))
