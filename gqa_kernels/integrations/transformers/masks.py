"""SequenceMask: causality, a window and packed sequences, without a mask of S² entries.

transformers makes a mask by evaluating a function of indices for all pairs of tokens. If that
function consists only of transformers' own causal, sliding-window and packed-sequence parts, and no
token is padding, attention needs just the window and the offsets of the sequences. They are read
out of the function. Every other mask is made as for SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

HOME = "transformers.masking_utils"  # of the functions that are known here


class SequenceMask:
    """Causal attention inside each of several concatenated sequences; not a tensor.

    Models pass it to their attention layers unchanged. Code that looks into it (a slice, a
    ``torch`` function, an attribute of tensors) gets the dense mask.

    Attributes:
        window: keys that a query sees, its own included; None: all before it.
        offsets: int32 ``[n + 1]``, where each sequence begins in the concatenated rows of the
            batch, ``[B * S]`` tokens; None: every row is one sequence.
        longest: most tokens of a sequence.
        dense: the boolean mask, ``[B, 1, S, S]``.
    """

    def __init__(
        self, window: int | None, offsets: Tensor | None, longest: int, make: Callable[[], Tensor]
    ):
        self.window, self.offsets, self.longest, self._make = window, offsets, longest, make

    @cached_property
    def dense(self) -> Tensor:
        return self._make()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for such
            raise AttributeError(name)
        return getattr(self.dense, name)

    @classmethod
    def __torch_function__(cls, function, _, args=(), kwargs=None):
        args, kwargs = _made(list(args)), _made(kwargs or {})
        return function(*args, **kwargs)


def _forward(name: str) -> None:
    def operator(self: SequenceMask, *others: Any) -> Any:
        return getattr(self.dense, name)(*map(_made, others))

    setattr(SequenceMask, name, operator)


for _name in ("and", "rand", "or", "ror", "add", "radd", "sub", "rsub", "mul", "rmul"):
    _forward(f"__{_name}__")
for _name in ("eq", "ne", "invert", "getitem", "len", "bool"):
    _forward(f"__{_name}__")


def _made(x: Any) -> Any:
    """Tensors in place of the SequenceMasks in ``x``."""
    if isinstance(x, SequenceMask):
        return x.dense
    if isinstance(x, dict):
        return {key: _made(value) for key, value in x.items()}
    return type(x)(map(_made, x)) if type(x) in (list, tuple) else x


def sequence_mask(**call: Any) -> Tensor | SequenceMask | None:
    """The mask function of ``AttentionMaskInterface``; arguments as for transformers' sdpa_mask.

    Returns:
        None if plain causality (or no mask at all) is enough; a SequenceMask; or a boolean mask
        ``[B, 1, Sq, Sk]``.
    """
    from transformers.masking_utils import sdpa_mask

    padding = call.get("attention_mask")
    if isinstance(padding, SequenceMask):  # of a model within a model: the mask exists already
        return padding
    tensors = [x for x in call.values() if isinstance(x, Tensor)]
    if not all(map(has_values, tensors)) and not _is_traced():  # meta and fake tensors
        skips = ("allow_is_causal_skip", "allow_is_bidirectional_skip")
        return sdpa_mask(**{**call, **dict.fromkeys(skips, False)})
    pattern = None if _is_traced() else _pattern_of(call)
    if pattern is None or not (pattern.sequences is None or has_values(pattern.sequences)):
        return sdpa_mask(**call)
    offsets, longest = None, call["kv_length"]
    if pattern.sequences is not None:
        sequences = pattern.sequences.expand(call["batch_size"], -1)
        begins = torch.ones_like(sequences, dtype=torch.bool)
        begins[:, 1:] = sequences.diff() != 0
        offsets = row_offsets(begins)
        longest = int(offsets.diff().max())
        if len(offsets) == len(begins) + 1:  # transformers 4 reports every batch as packed
            offsets = None
    return SequenceMask(pattern.window, offsets, longest, lambda: sdpa_mask(**call))


@dataclass(frozen=True)
class Pattern:
    """What a mask function allows besides causal attention.

    Attributes:
        window: keys that a query sees, its own included; None: all before it.
        sequences: ``[B, S]``, a number for each sequence; None: every row is one.
    """

    window: int | None = None
    sequences: Tensor | None = None


def read(function: Callable) -> Pattern | None:
    """The pattern of a mask function; None if it has an unknown part."""
    parts = _parts(function)
    if parts is None or "causal" not in parts:
        return None
    return Pattern(parts.get("window"), parts.get("sequences"))


def _parts(function: Callable) -> dict[str, Any] | None:
    from transformers.masking_utils import causal_mask_function

    if function is causal_mask_function:
        return {"causal": True}
    if not isinstance(function, FunctionType) or function.__module__ != HOME:
        return None
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    closure = dict(zip(function.__code__.co_freevars, cells, strict=True))
    match function.__qualname__.split(".")[0], closure:
        case "sliding_window_overlay", {"sliding_window": int(window)}:
            return {"window": window}
        case "packed_sequence_mask_function", {"packed_sequence_mask": Tensor() as sequences}:
            return {"sequences": sequences}
        # Positions rise by one inside a sequence: what they say of two tokens, indices say too.
        case "remap_positions_for_packed_sequence", {"mask_function": inner}:
            return _parts(inner)
        case "and_masks", {"mask_functions": functions}:
            return _joined([_parts(one) for one in functions])
    return None


def _joined(parts: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """All of the parts; None if one is unknown, or two are of the same kind."""
    found: dict[str, Any] = {}
    for part in parts:
        if part is None or (part.keys() & found.keys()) - {"causal"}:
            return None
        found |= part
    return found


def _pattern_of(call: dict[str, Any]) -> Pattern | None:
    """The pattern of a call in which queries and keys are the same tokens, from the first on.

    None if it has padding or an unknown part, or if plain causality says it all.
    """
    num_keys = call["kv_length"]
    positions = call.get("cache_position")  # transformers 4
    num_queries = len(positions) if positions is not None else call["q_length"]
    if num_queries != num_keys or num_keys == 1:
        return None
    for begin in (call.get("q_offset", 0), call.get("kv_offset", 0)):
        if not isinstance(begin, int) or begin != 0:  # a tensor is on the device
            return None
    padding = call.get("attention_mask")
    if padding is not None and not (padding.shape[-1] == num_keys and bool(padding.all())):
        return None
    pattern = read(call["mask_function"])
    if pattern is None or pattern.sequences is not None:
        return pattern
    plain = pattern.window is None or pattern.window > num_keys
    return None if plain else pattern


def row_offsets(begins: Tensor) -> Tensor:
    """Offsets, int32 ``[n + 1]``, of sequences in the concatenated rows.

    Args:
        begins: bool ``[B, S]``, true at the first token of each sequence.
    """
    offsets = begins.flatten().nonzero()[:, 0]
    return torch.nn.functional.pad(offsets, (0, 1), value=begins.numel()).to(torch.int32)


def has_values(x: Tensor) -> bool:
    """Whether a tensor has values to look at: not a meta tensor, nor a fake one."""
    return not x.is_meta and not isinstance(x, FakeTensor)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
