"""Attention calls that every backend must get right, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.backends.base import Capabilities
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.testing import make_inputs

LOWEST = torch.finfo(torch.float32).min
UNEVEN = HeadMap([0, 0, 0, 1, 2, 2])
INTERLEAVED = HeadMap([2, 0, 1, 0, 2, 2, 0])
DIVISIBLE_BUT_UNEVEN = HeadMap([0, 0, 0, 1])  # ordinary kernels silently compute another function
WITH_EMPTY = HeadMap([3, 1, 1, 3, 3], num_kv_heads=5)
SINGLETONS = HeadMap([1, 0, 2])
ONE_HEAD = HeadMap([0])
LARGE_GROUP = HeadMap([0] * 33 + [1])  # more rows than one tile has
EVEN = HeadMap.uniform(4, 2)


@dataclass(frozen=True)
class Case:
    """One call; ``options`` are as the API takes them, tensors made by functions of the case."""

    id: str
    head_map: HeadMap = UNEVEN
    batch: int = 2
    q_len: int = 33
    kv_len: int = 47
    head_dim: int = 32
    value_head_dim: int | None = None
    value_head_map: HeadMap | None = None
    strided: bool = False
    options: dict[str, object | Callable[[Case], object]] = field(default_factory=dict)

    def needs(self) -> set[str]:
        """Names of the capabilities that the call takes."""
        option_of = {
            "causal": "window",
            "window": "window",
            "softcap": "softcap",
            "alibi_slopes": "alibi",
            "sinks": "sinks",
            "kv_lengths": "kv_lengths",
            "batch_invariant": "batch_invariant",
            "key_ranges": "key_ranges",
        }
        needs = {option_of[name] for name in self.options if name in option_of}
        if self.value_head_map:
            needs.add("value_head_map")
        if "attn_mask" in self.options:
            mask = self.options["attn_mask"](self)
            needs.add("bool_mask" if mask.dtype == torch.bool else "additive_mask")
        return needs

    def runs_on(self, can: Capabilities) -> bool:
        """Whether a backend with these capabilities can run the case."""
        dims = (self.head_dim, self.value_head_dim or 0)
        return self.needs() <= can.options and max(dims) <= can.max_head_dim

    def build(self, dtype: torch.dtype, device: str, layout: str = "bhsd"):
        """``(q, k, v, head_map), options`` for the call."""
        q, k, v = make_inputs(
            self.batch, self.head_map, self.q_len, self.kv_len, self.head_dim,
            value_head_dim=self.value_head_dim, value_head_map=self.value_head_map,
            dtype=dtype, device=device, layout=layout, strided=self.strided,
        )  # fmt: skip
        options = {
            name: value(self) if callable(value) else value for name, value in self.options.items()
        }
        options = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()
        }
        if self.value_head_map:
            options["value_head_map"] = self.value_head_map
        if layout != "bhsd":
            options["layout"] = layout
        return (q, k, v, self.head_map), options


def _random(case: Case, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def slopes(case: Case) -> torch.Tensor:
    return _random(case, case.head_map.num_heads).abs() / 4


def slopes_per_batch(case: Case) -> torch.Tensor:
    return _random(case, case.batch, case.head_map.num_heads).abs() / 4


def sinks(case: Case) -> torch.Tensor:
    return 2 * _random(case, case.head_map.num_heads)


def bool_mask(case: Case) -> torch.Tensor:
    """Per head; some rows see nothing."""
    mask = _random(case, case.batch, case.head_map.num_heads, case.q_len, case.kv_len) > -0.3
    mask[:, :, :: max(1, case.q_len // 3)] = False
    return mask


def padding_mask(case: Case) -> torch.Tensor:
    """``[B, 1, 1, Sk]``: the left half of the first sequence is padding."""
    mask = torch.ones(case.batch, 1, 1, case.kv_len, dtype=torch.bool)
    mask[0, ..., : case.kv_len // 2] = False
    return mask


def additive_mask(case: Case) -> torch.Tensor:
    """``[Sq, Sk]`` with values that hide a key, one whole row of each kind."""
    mask = _random(case, case.q_len, case.kv_len)
    below_half = torch.nextafter(torch.tensor(LOWEST / 2), torch.tensor(-torch.inf)).item()
    for i, (value, above) in enumerate([(-torch.inf, 1.5), (LOWEST, 1.2), (below_half, 1.0)]):
        mask = mask.masked_fill(mask > above, value)
        mask[(case.q_len // 2 + i) % case.q_len] = value
    return mask


def ranges(case: Case) -> torch.Tensor:
    """Per head; some reach beyond the keys on either side, some are empty, some end before they
    begin."""
    shape = (case.batch, case.head_map.num_heads, case.q_len)
    begin = (_random(case, *shape) * case.kv_len / 3).int()
    size = (_random(case, *shape[:0:-1]).T.expand(shape) * case.kv_len).int()
    return torch.stack([begin, begin + size], -1)


def documents(case: Case) -> torch.Tensor:
    """``[B, 1, Sq, 2]``: each query sees the keys of its own third, whole."""
    bounds = torch.arange(4) * case.kv_len // 3
    third = torch.arange(case.q_len) * 3 // max(case.q_len, 1)
    return torch.stack([bounds[third], bounds[third + 1]], -1).expand(case.batch, 1, -1, -1)


def lengths(case: Case) -> torch.Tensor:
    """One empty sequence, the others ragged."""
    return torch.arange(case.batch, dtype=torch.int32) * case.kv_len // max(1, case.batch)


def lengths_per_head(case: Case) -> torch.Tensor:
    steps = torch.arange(case.batch * case.head_map.num_kv_heads, dtype=torch.int64)
    return (steps * 13 % (case.kv_len + 1)).view(case.batch, case.head_map.num_kv_heads)


_OPTION_CASES = [
    Case("plain"),
    Case("causal", options={"causal": True}),
    Case("causal-more-queries-than-keys", q_len=41, kv_len=17, options={"causal": True}),
    Case("window-left", options={"causal": True, "window": (9, None)}),
    Case("window-both", options={"window": (5, 3)}),
    Case("window-right", options={"window": (None, 2)}),
    Case("window-zero", options={"window": (0, 0)}),
    Case("scale", options={"scale": -0.3}),
    Case("softcap", options={"softcap": 1.5, "causal": True}),
    Case("alibi", options={"alibi_slopes": slopes}),
    Case("alibi-per-batch-causal", options={"alibi_slopes": slopes_per_batch, "causal": True}),
    Case("sinks", options={"sinks": sinks, "causal": True}),
    Case("sinks-empty-rows", q_len=20, kv_len=9, options={"sinks": sinks, "causal": True}),
    Case("bool-mask", options={"attn_mask": bool_mask}),
    Case("padding-mask-causal", options={"attn_mask": padding_mask, "causal": True}),
    Case("additive-mask", options={"attn_mask": additive_mask}),
    Case("lengths", batch=3, options={"kv_lengths": lengths}),
    Case("key-ranges", options={"key_ranges": ranges}),
    Case("key-ranges-documents", options={"key_ranges": documents, "causal": True}),
    Case("key-ranges-mask", options={"key_ranges": ranges, "attn_mask": bool_mask}),
    Case(
        "key-ranges-everything",
        batch=3,
        value_head_map=HeadMap([1, 0, 1, 1, 0, 1]),
        options={
            "key_ranges": ranges,
            "window": (30, 3),
            "softcap": 3.0,
            "alibi_slopes": slopes,
            "sinks": sinks,
            "kv_lengths": lengths_per_head,
        },
    ),
    Case("batch-invariant", options={"batch_invariant": True, "causal": True}),
    Case("lengths-causal", batch=3, options={"kv_lengths": lengths, "causal": True}),
    Case("lengths-per-head", options={"kv_lengths": lengths_per_head}),
    Case(
        "everything",
        batch=3,
        value_head_map=HeadMap([1, 0, 1, 1, 0, 1]),
        value_head_dim=24,
        options={
            "causal": True,
            "window": (20, None),
            "softcap": 3.0,
            "alibi_slopes": slopes,
            "sinks": sinks,
            "attn_mask": additive_mask,
            "kv_lengths": lengths,
            "scale": 0.4,
        },
    ),
]

_MAP_CASES = [
    Case(f"map-{name}", head_map=head_map, options={"causal": True})
    for name, head_map in {
        "interleaved": INTERLEAVED,
        "divisible-but-uneven": DIVISIBLE_BUT_UNEVEN,
        "with-empty": WITH_EMPTY,
        "singletons": SINGLETONS,
        "one-head": ONE_HEAD,
        "even": EVEN,
    }.items()
] + [
    Case("map-large-group", head_map=LARGE_GROUP, batch=1, q_len=5),
    Case("value-map", value_head_map=HeadMap([0, 1, 1, 0, 0, 1])),
    Case("value-map-more-heads", value_head_map=HeadMap([3, 1, 2, 0, 4, 5], num_kv_heads=7)),
    Case("value-map-interleaved", INTERLEAVED, value_head_map=HeadMap([0, 1, 0, 1, 0, 1, 0])),
]

_SHAPE_CASES = [
    Case("strided", strided=True, options={"causal": True}),
    Case("one-query", q_len=1, kv_len=70),
    Case("one-query-one-key", q_len=1, kv_len=1),
    Case("no-keys", q_len=3, kv_len=0, options={"sinks": sinks}),
    Case("one-batch-long", batch=1, head_map=SINGLETONS, q_len=2, kv_len=391),
    *(
        Case(f"dims-{d}-{dv}", head_map=SINGLETONS, batch=1, head_dim=d, value_head_dim=dv)
        for d, dv in [(16, 16), (40, 40), (80, 96), (96, 64), (128, 128), (192, 128), (256, 256),
                      (1, 3), (7, 250), (111, 59)]
    ),
]  # fmt: skip

PREFILL_CASES = _OPTION_CASES + _MAP_CASES + _SHAPE_CASES
DECODE_CASES = [
    replace(case, id=f"decode{q_len}-{case.id}", q_len=q_len, kv_len=case.kv_len * 3)
    for case in _OPTION_CASES + _MAP_CASES
    for q_len in ((1, 5) if case.id in ("plain", "everything") else (5,))
    if "more-queries" not in case.id
]
# Beyond what most backends can run: the global layers of Gemma 4, and latent attention.
WIDE_CASES = [
    Case(f"wide{q_len}-{d}-{dv}", head_map=DIVISIBLE_BUT_UNEVEN, batch=1, q_len=q_len, head_dim=d,
         value_head_dim=dv, options={"causal": True})
    for d, dv in [(257, 300), (320, 320), (512, 512), (576, 512), (64, 576), (576, 5)]
    for q_len in (33, 2)
]  # fmt: skip
CASES = PREFILL_CASES + DECODE_CASES + WIDE_CASES


def interpreted(backend: str) -> bool:
    """Whether this is Triton's interpreter, which is slow, and runs programs one after another."""
    return backend == "triton" and not torch.cuda.is_available()


def racing(backends: list[str]) -> list:
    """Backends whose results could differ from run to run; interpreted Triton's can't: slow."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if interpreted(name) else [])
        for name in backends
    ]


def matrix(backends: list[str], once: bool = False) -> list:
    """(case, backend, dtype) of every case that a backend declares it can run.

    Where Triton is interpreted, a case runs in fp32 and, in turn, in one 16-bit type, or, if
    ``once``, in one type only; the others are slow, and with ``once`` the long ones of wide heads.
    """
    turns = (torch.bfloat16, torch.float16, torch.float32, torch.float32)
    found = []
    for name in backends:
        can = BACKENDS[name].capabilities
        for dtype in sorted(can.dtypes, key=str):
            rows = [case for case in CASES if case.runs_on(can)]
            for row, case in enumerate(rows):
                wanted = {turns[row % 4]} if once else {turns[row % 2], torch.float32}
                long = once and case in WIDE_CASES and case.q_len > 2
                skipped = interpreted(name) and (dtype not in wanted or long)
                found.append(
                    pytest.param(
                        case, name, dtype, marks=[pytest.mark.slow] if skipped else [],
                        id=f"{name}-{str(dtype).removeprefix('torch.')}-{case.id}",
                    )
                )  # fmt: skip
    return found
