"""Triton launches compiled ahead of time, without a GPU or its driver.

Only in a process without ``TRITON_INTERPRET=1``, which replaces Triton's compiler: tests run the
scripts of this folder as subprocesses.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature

from gqa_kernels import HeadMap
from gqa_kernels.attention import attention_call
from gqa_kernels.backends.triton.configs import GFX9_MEMORY, DeviceFacts
from gqa_kernels.backends.triton.launch.backward import BackwardCall
from gqa_kernels.backends.triton.launch.base import Launch
from gqa_kernels.backends.triton.launch.forward import CacheCall, ForwardCall
from gqa_kernels.backends.triton.plan import plan_for
from gqa_kernels.backends.triton.splits import ceil_div
from gqa_kernels.cache.base import KVCache
from gqa_kernels.cache.paged import PagedKVCache
from gqa_kernels.call.attention import AttentionCall
from gqa_kernels.decode import view_call
from gqa_kernels.native.schema import empty_output
from tools.sass.disassemble import disassemble
from tools.sass.loops import main_loops

assert os.environ.get("TRITON_INTERPRET", "0") != "1"


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: its facts as on a typical device, and its shared memory per program."""

    gpu: GPUTarget
    facts: DeviceFacts
    shared_bytes: int


KIB = 1024
TARGETS = {
    "sm_80": Target(
        GPUTarget("cuda", 80, 32), DeviceFacts("sm80", 108, 40 << 20, 164 * KIB), 163 * KIB
    ),
    "sm_90": Target(
        GPUTarget("cuda", 90, 32), DeviceFacts("sm90", 132, 50 << 20, 228 * KIB), 227 * KIB
    ),
    "sm_100": Target(
        GPUTarget("cuda", 100, 32), DeviceFacts("sm100", 148, 126 << 20, 228 * KIB), 227 * KIB
    ),
    "sm_86": Target(
        GPUTarget("cuda", 86, 32), DeviceFacts("sm86", 84, 6 << 20, 100 * KIB), 99 * KIB
    ),
    "gfx942": Target(
        GPUTarget("hip", "gfx942", 64), DeviceFacts("gfx9", 304, 4 << 20, *GFX9_MEMORY), 64 * KIB
    ),
}


@dataclass(frozen=True)
class Specialisation:
    """What Triton compiles for a launch, by the functions that a real launch calls.

    Attributes:
        key: what a launch looks its compiled kernel up by. Equal keys compile once.
        types: by argument, of tuples a tuple; ``"constexpr"`` of what is known at compile time.
        constants, attributes: by path, (argument, member, ...).
    """

    key: str
    types: dict[str, str | tuple]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, object]

    @classmethod
    def of(cls, launch: Launch, gpu: GPUTarget) -> Specialisation:
        kernel, backend = launch.kernel, make_backend(gpu)
        given = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialised, _ = bind(**launch.arguments, **given)
        options, types, constants, attributes = kernel._pack_args(
            backend, given, bound, specialised, given
        )
        key = compute_cache_key({}, specialised, given)
        return cls(key, types, constants, attributes, options.__dict__)


def runtime_arguments(launch: Launch, types: dict[str, str | tuple]) -> dict[str, object]:
    """What a launch hands to its compiled kernel, in order; members of tuples as ``q.ptr``."""
    found = {}

    def visit(name: str, value: object, kind: str | tuple) -> None:
        if isinstance(kind, tuple):
            members = getattr(value, "_fields", range(len(value)))
            for member, x, x_kind in zip(members, value, kind, strict=True):
                visit(f"{name}.{member}", x, x_kind)
        elif kind != "constexpr":
            found[name] = value

    for name, kind in types.items():
        visit(name, launch.arguments[name], kind)
    return found


def compile_launch(launch: Launch, gpu: GPUTarget):
    """Triton's compiled kernel of a launch."""
    what = Specialisation.of(launch, gpu)
    source = ASTSource(launch.kernel, what.types, what.constants, what.attributes)
    return triton.compile(source, target=gpu, options=what.options)


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, bytes of spills (NVIDIA) or spilled registers (AMD). Per program:
    bytes of shared memory. Per warp: instructions of one step of the main loop, if there is one
    and the target is NVIDIA's."""

    registers: int
    spills: int
    shared: int
    step: int | None = None


def resources(compiled) -> Resources:
    """What a compiled kernel uses."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return Resources(registers, spills, shared)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    if "sm_10" in re.search(r"\.target (\S+)", compiled.asm["ptx"])[1]:
        newer = ptxas.with_name("ptxas-blackwell")
        ptxas = newer if newer.exists() else ptxas
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        command = [str(ptxas), "-v", f"-arch={target}", str(source), "-o", f"{folder}/kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        loops = [loop for kernel in disassemble(Path(folder, "kernel.cubin"))
                 for loop in main_loops(kernel)]  # fmt: skip
    registers = re.search(r"Used (\d+) registers", report)[1]
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()
    step = min((len(loop.path) for loop in loops), default=None)
    return Resources(int(registers), sum(map(int, spills)), shared, step)


def make_call(
    q_len: int,
    kv_len: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    value_head_dim: int | None = None,
    head_map: HeadMap | None = None,
    batch: int = 2,
    seed: int = 0,
    **options,
) -> tuple[AttentionCall, ForwardCall]:
    """A call on random CPU tensors, with outputs to write into."""
    head_map = head_map or HeadMap.uniform(32, 8)
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, tokens: int, dim: int) -> torch.Tensor:
        return torch.randn(batch, heads, tokens, dim, generator=generator).to(dtype)

    inputs = attention_call(
        normal(head_map.num_heads, q_len, head_dim),
        normal(head_map.num_kv_heads, kv_len, head_dim),
        normal(head_map.num_kv_heads, kv_len, value_head_dim or head_dim),
        head_map,
        **options,
    ).draw_dropout_seed()
    out = empty_output(inputs.q, inputs.value_head_dim, inputs.bshd).fill_(torch.nan)
    lse = torch.full(out.shape[:3], torch.nan)
    call = ForwardCall(
        inputs.q, inputs.k, inputs.v, plan_for(inputs), inputs.alibi_slopes, inputs.sinks,
        inputs.attn_mask, inputs.kv.kv_lengths, inputs.scale,
        inputs.options.window_left, inputs.options.window_right,
        inputs.options.softcap, inputs.options.dropout_p, inputs.dropout_seed, out, lse,
    )  # fmt: skip
    return inputs, call


def make_backward(call: ForwardCall, *, slopes: bool = False, seed: int = 1) -> BackwardCall:
    """The backward of a call whose outputs are there, on random gradients, with NaN to overwrite.

    Args:
        slopes: with the partial gradients of the ALiBi slopes, of tiles of 16 tokens or more.
    """
    generator = torch.Generator().manual_seed(seed)
    dout = torch.randn(call.out.shape, generator=generator).to(call.out.dtype)
    dlse = torch.randn(call.lse.shape, generator=generator)
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (call.q, call.k, call.v))
    delta = torch.full_like(call.lse, torch.nan)
    partial = torch.zeros(*call.lse.shape[:2], ceil_div(call.lse.shape[2], 16))
    return BackwardCall(call, True, dout, dlse, delta, dq, dk, dv, partial if slopes else None)


def make_cache(
    head_map: HeadMap, lengths: list[int], head_dim: int, dtype: torch.dtype, page_size: int,
    format: str | None = None, zeros: bool = False, seed: int = 0,
) -> KVCache:  # fmt: skip
    """A paged cache with random tokens in pages of random order, NaN in all other slots."""
    generator = torch.Generator().manual_seed(seed)
    max_pages = -(-max(lengths) // page_size)
    table = torch.randperm(len(lengths) * max_pages + 1, generator=generator)[:-1]
    heads = head_map.num_kv_heads
    cache = PagedKVCache.empty(
        len(table) + 1, page_size, heads, head_dim, dtype=dtype, format=format, zeros=zeros,
        order="NHD",
    )  # fmt: skip
    for x in (cache.k, cache.v, *cache.scales.values()):
        if x is not None and x.is_floating_point() and x.element_size() > 1:
            x.fill_(torch.nan)
    table = table.view(len(lengths), max_pages).to(torch.int32)
    cache = cache.at(table, torch.zeros(len(lengths), dtype=torch.int32))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    k, v = torch.randn(2, sum(lengths), heads, head_dim, generator=generator).to(dtype)
    cache.append(k, v, cu_seqlens=offsets, backend="reference")
    return cache


def make_cache_call(
    q_lens: list[int], cache: KVCache, head_map: HeadMap, dtype: torch.dtype, *, seed: int = 1,
    **options,
) -> tuple[AttentionCall, ForwardCall]:  # fmt: skip
    """A call of random queries over a cache, packed where their counts differ; and outputs to
    write into."""
    generator = torch.Generator().manual_seed(seed)
    view, heads = cache.view(), head_map.num_heads
    if len(set(q_lens)) == 1:
        shape = (len(q_lens), heads, q_lens[0], view.head_dim)
    else:
        shape = (sum(q_lens), heads, view.head_dim)
        options["cu_seqlens_q"] = torch.tensor([0, *q_lens]).cumsum(0)
        options["max_seqlen_q"] = max(q_lens)
    q = torch.randn(shape, generator=generator).to(dtype)
    inputs = view_call(q, view, head_map, **options)
    view = inputs.kv
    out = inputs.q.new_full((*inputs.q.shape[:3], inputs.value_head_dim), torch.nan)
    lse = torch.full(out.shape[:3], torch.nan)
    packing = (view.page_table, view.kv_begin, inputs.q_offsets, inputs.q_len, view.capacity)
    scales = (view.k_scale, view.v_scale, view.k_zero, view.v_zero)
    call = ForwardCall(
        inputs.q, view.k, view.v, plan_for(inputs), inputs.alibi_slopes, inputs.sinks,
        inputs.attn_mask, view.kv_lengths, inputs.scale,
        inputs.options.window_left, inputs.options.window_right,
        inputs.options.softcap, 0.0, None, out, lse, CacheCall(*packing, *scales),
    )  # fmt: skip
    return inputs, call


def every_option(q_len: int, kv_len: int, num_heads: int, batch: int) -> dict[str, object]:
    """One value for each option that changes the compiled kernel."""
    mask = torch.randn(1, 1, q_len, kv_len)
    return {
        "causal": True,
        "window": (kv_len // 2, None),
        "softcap": 5.0,
        "alibi_slopes": torch.linspace(0.05, 0.5, num_heads),
        "sinks": torch.linspace(-1, 2, num_heads),
        "attn_mask": mask.masked_fill(mask > 1.5, -torch.inf),
        "kv_lengths": torch.arange(1, batch + 1) * kv_len // batch,
    }
