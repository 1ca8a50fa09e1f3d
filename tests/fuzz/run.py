"""One call from its seed: drawn, made, and checked."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from gqa_kernels import (
    asym_gqa_attention,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
    available_backends,
    explain_backend,
)

from .attention import draw_attention, draw_varlen
from .bookkeeping import draw_allocator, draw_head_map
from .decode import draw_append, draw_decode
from .draw import Call, Draw
from .hostile import draw_constructor, run_hostile, spoil
from .keeping import draw_keep
from .memory import storage_bytes
from .merging import draw_merge, draw_shared_prefix

# How often each kind is drawn.
GOOD = {
    draw_attention: 8,
    draw_varlen: 5,
    draw_decode: 9,
    draw_append: 4,
    draw_keep: 3,
    draw_merge: 2,
    draw_shared_prefix: 2,
    draw_head_map: 1,
    draw_allocator: 1,
}
SPOILT = {**GOOD, draw_constructor: 6}
EXPLAINED = {
    "asym_gqa_attention": (asym_gqa_attention, ("q", "k", "v", "head_map")),
    "asym_gqa_varlen_attention": (
        asym_gqa_varlen_attention,
        ("q", "k", "v", "head_map", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q",
         "max_seqlen_k"),
    ),
    "asym_gqa_decode": (asym_gqa_decode, ("q", "cache", "head_map")),
}  # fmt: skip
NOT_EXPLAINED = ("backend", "return_lse", "return_aux", "advance", "k_new", "v_new", "rotary_cos",
                 "rotary_sin", "rotary_interleaved")  # fmt: skip


def draw_call(seed: int) -> tuple[Draw, Call, bool]:
    """The random source, the call, and whether it is a good one."""
    draw = Draw(seed)
    good = draw.chance(0.5)
    kinds = GOOD if good else SPOILT
    call = draw.source.choices(list(kinds), list(kinds.values()))[0](draw)
    if not good:
        spoil(draw, call)
    return draw, call, good


def run_seed(seed: int) -> tuple[str, ...]:
    """Make the call of a seed; the public names that it covers.

    Raises:
        AssertionError: something that must hold does not.
    """
    draw, call, good = draw_call(seed)
    try:
        if good:
            run_good(call, draw)
        else:
            run_hostile(call)
    except Exception as error:
        kind = "good call" if good else "hostile call"
        raise AssertionError(f"{kind}: {type(error).__name__}: {error}\n  {call}") from error
    explained = ("explain_backend", "available_backends") if call.names[-1] in EXPLAINED else ()
    return (*call.names, *explained) if good else ()


def run_good(call: Call, draw: Draw) -> None:
    """A call without fault: its result is right, and nothing but ``call.written`` changed."""
    tensors = {name: x for name, x in call.arguments.items() if isinstance(x, Tensor)}
    before = {name: storage_bytes(x) for name, x in tensors.items()}
    written = {x.untyped_storage().data_ptr() for x in call.written}
    flush, threads = draw.chance(0.1), draw.pick(1, 1, 2, 3)
    torch.set_num_threads(threads)
    try:
        torch.set_flush_denormal(flush)
        result = call.function(**call.arguments)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(1)
    for name, x in tensors.items():
        if x.untyped_storage().data_ptr() not in written:
            assert torch.equal(storage_bytes(x), before[name]), f"{name} was modified"
    call.check(result)
    if call.names[-1] in EXPLAINED and not call.written:
        check_explanation(call)


def check_explanation(call: Call) -> None:
    """explain_backend must give no reason against a backend that ran the call."""
    function, names = EXPLAINED[call.names[-1]]
    arguments = {name: x for name, x in call.arguments.items() if name not in NOT_EXPLAINED}
    given = [arguments.pop(name) for name in names]
    reasons = explain_backend(function, *given, **arguments)
    backend = call.arguments["backend"]
    backend = next(name for name in reasons if not reasons[name]) if backend == "auto" else backend
    assert not reasons[backend], f"{backend} ran, yet explain_backend says {reasons[backend]}"
    assert backend in available_backends()


def quiet() -> None:
    """Warnings of slow paths prove nothing here."""
    warnings.simplefilter("ignore")
