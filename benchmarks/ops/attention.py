"""An attention case with its tensors, and the gate that every result passes before it is timed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from gqa_kernels import HeadMap
from gqa_kernels.attention import attention_call
from gqa_kernels.backends.reference.formula import reference_attention
from gqa_kernels.testing import assert_close, equivalent_forms, upcast

from ..data.cases import Case
from ..measure.timing import cache_bytes

CHECK_ALL_BELOW = 1 << 20  # scores of a call up to which every row is checked
BLOCK_ROWS = 16  # query rows of a checked block beyond that
ENOUGH_NUMBERS = 1 << 15  # outputs of a block from which two forms of eager are a sure yardstick
MOST_COPIES = 64
BIAS_DISTANCE = 128  # T5's: farther tokens share a bias


@dataclass(frozen=True)
class Problem:
    """Tensors of a case.

    Attributes:
        copies: q ``[B, Hq, Sq, D]``, k and v ``[B, Hkv, Sk, D]``, with other values in each copy.
    """

    case: Case
    copies: list[tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def build(cls, case: Case, device: torch.device) -> Problem:
        return cls(case, [_inputs(case, device, seed) for seed in range(num_copies(case, device))])

    @property
    def tensors(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q, k, v of every copy."""
        return self.copies

    @cached_property
    def expanded(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The copies with K and V expanded to all query heads, shared by the peers that need it."""
        index = self.head_map.tensor(self.device).long()
        return [(q, k[:, index], v[:, index]) for q, k, v in self.copies]

    @cached_property
    def bias(self) -> Tensor | None:
        """``[1, Hq, Sq, Sk]``, by head and clipped distance, where the model has one."""
        case = self.case
        if not case.relative_bias:
            return None
        generator = torch.Generator().manual_seed(0)
        shape = (case.head_map.num_heads, 2 * BIAS_DISTANCE + 1)
        by_distance = torch.randn(shape, generator=generator).to(self.device, case.torch_dtype)
        distance = torch.arange(case.kv_len) - torch.arange(case.q_len)[:, None]
        index = distance.clamp(-BIAS_DISTANCE, BIAS_DISTANCE) + BIAS_DISTANCE
        return by_distance[None, :, index.to(self.device)]

    @property
    def options(self) -> dict:
        """Keyword arguments of the attention call."""
        mask = {} if self.bias is None else {"attn_mask": self.bias}
        return self.case.options | mask

    @property
    def head_map(self) -> HeadMap:
        return self.case.head_map

    @property
    def device(self) -> torch.device:
        return self.copies[0][0].device


def num_copies(case: Case, device: torch.device) -> int:
    """Input copies that together exceed the last-level cache twice (on a CPU for cold cases)."""
    if device.type == "cpu" and not case.cold:
        return 1
    return min(MOST_COPIES, math.ceil(2 * cache_bytes(device) / case.work.bytes))


def _inputs(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normal random q, k, v, made on the device: a batch of long caches takes seconds elsewhere."""
    generator = torch.Generator(device).manual_seed(seed)

    def one(heads: int, length: int) -> Tensor:
        shape = (case.batch, heads, length, case.head_dim)
        return torch.randn(shape, generator=generator, dtype=case.torch_dtype, device=device)

    heads, kv_heads = case.head_map.num_heads, case.head_map.num_kv_heads
    return one(heads, case.q_len), one(kv_heads, case.kv_len), one(kv_heads, case.kv_len)


class Gate:
    """Holds results of a problem's first copy to the package's tolerance rule.

    Small calls are checked whole. Of larger ones every element must be finite, and blocks of rows,
    all heads, are compared: the first and a middle one of the first sequence, the last of the last.
    """

    def __init__(self, problem: Problem):
        self.shape = problem.copies[0][0].shape
        self.dtype = problem.case.torch_dtype
        self.blocks = [_Block(problem, *part) for part in _parts(problem.case)]

    def check(self, out: Tensor) -> None:
        """Raises AssertionError, saying what is wrong, for a wrong result.

        Args:
            out: ``[B, Hq, Sq, D]``.
        """
        assert out.shape == self.shape, f"out: shape {tuple(out.shape)}, expected {self.shape}"
        assert out.dtype == self.dtype, f"out: dtype {out.dtype}, expected {self.dtype}"
        assert out.isfinite().all(), "out: some elements are not finite"
        for block in self.blocks:
            block.check(out)


def _parts(case: Case) -> list[tuple[int, int, int]]:
    """Sequence, first row and last row + 1 of each block to check."""
    scores = case.head_map.num_heads * case.q_len * case.kv_len
    if case.batch * scores <= CHECK_ALL_BELOW:
        return [(b, 0, case.q_len) for b in range(case.batch)]
    last = case.batch - 1
    if case.q_len <= 3 * BLOCK_ROWS:
        return [(b, 0, case.q_len) for b in sorted({0, last})]
    middle = case.q_len // 2 - 7
    return [
        (0, 0, BLOCK_ROWS),
        (0, middle, middle + BLOCK_ROWS),
        (last, case.q_len - BLOCK_ROWS, case.q_len),
    ]


class _Block:
    """Query rows of one sequence, with their exact results and eager torch's errors."""

    def __init__(self, problem: Problem, sequence: int, start: int, stop: int):
        case = problem.case
        self.index = (slice(sequence, sequence + 1), slice(None), slice(start, stop))
        q, k, v = (x[sequence : sequence + 1] for x in problem.copies[0])
        # Causal is aligned to the last key: without the keys beyond the block's last row, the
        # block's rows are the last of a shorter call.
        keys = stop + case.kv_len - case.q_len if case.causal else case.kv_len
        options = dict(case.options)
        if problem.bias is not None:
            options["attn_mask"] = problem.bias[:, :, start:stop, :keys]
        inputs = attention_call(
            q[:, :, start:stop], k[:, :, :keys], v[:, :, :keys], case.head_map, **options
        )
        with torch.no_grad():
            self.exact = reference_attention(upcast(inputs))[0]
            forms = equivalent_forms(inputs)
            if self.exact.numel() >= ENOUGH_NUMBERS:
                forms = islice(forms, 2)
            self.eager = [reference_attention(form, form.dtype, base2)[0] for form, base2 in forms]

    def check(self, out: Tensor) -> None:
        assert_close("out", out[self.index], self.exact, self.eager)
