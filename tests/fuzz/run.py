"""One call from its seed: drawn, made, and checked."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .attention import draw_attention, draw_varlen
from .caches import draw_append, draw_decode
from .draw import Call, Draw
from .memory import storage_bytes

KINDS = {
    "attention": draw_attention,
    "varlen": draw_varlen,
    "decode": draw_decode,
    "append": draw_append,
}
EXPECTED_ERRORS = (TypeError, ValueError, NotImplementedError)


def run_seed(seed: int) -> None:
    """Raises AssertionError where something that must hold does not."""
    draw = Draw(seed)
    kind = draw.pick(*KINDS)
    call = KINDS[kind](draw)
    try:
        run_good(call, draw)
    except Exception as error:
        raise AssertionError(f"{kind}: {type(error).__name__}: {error}\n  {call}") from error


def run_good(call: Call, draw: Draw) -> None:
    """A call without fault: its result is right, and nothing but ``call.written`` changed."""
    tensors = {name: x for name, x in call.arguments.items() if isinstance(x, Tensor)}
    before = {name: storage_bytes(x) for name, x in tensors.items()}
    written = {x.untyped_storage().data_ptr() for x in call.written}
    flush = draw.chance(0.1)
    torch.set_num_threads(draw.pick(1, 1, 2, 3))
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


def quiet() -> None:
    """Warnings of slow paths prove nothing here."""
    warnings.simplefilter("ignore")
