"""merge_attention_states and shared_prefix_attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gqa_kernels import merge_attention_states, shared_prefix_attention
from gqa_kernels.testing import assert_close

from .attention import maps
from .caches import CACHE_NAMES, draw_cache, value_heads_by_key
from .draw import DTYPES, Call, Draw
from .oracle import EXACT, Sequence, accumulated, eager_forms, hold


def merged(states: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs averaged with weights ``exp(lse)`` and LSEs added, computed in ``dtype``."""
    lse = torch.stack([lse.to(dtype) for _, lse in states])
    total = torch.logsumexp(lse, 0)
    share = torch.where(lse == -math.inf, 0, (lse - total).exp())
    outs = torch.stack([out.to(dtype).masked_fill(lse[..., None] == -math.inf, 0)
                        for (out, _), lse in zip(states, lse, strict=True)])  # fmt: skip
    return (share[..., None] * outs).sum(0), total


def draw_merge(draw: Draw) -> Call:
    """Two states, some of them of no key at all and with NaN for an output."""
    batch, heads, q_len = draw.pick(0, 1, 2), draw.head_count(), draw.pick(0, 1, 3, 17)
    dim, dtype = draw.pick(1, 8, 33, 64), draw.pick(*DTYPES)
    form = draw.pick("bhsd", "bshd", "packed")
    batch = 1 if form == "packed" else batch

    def state() -> tuple[Tensor, Tensor]:
        out = draw.normal(batch, heads, q_len, dim, dtype=dtype)
        lse = draw.normal(batch, heads, q_len, size=draw.pick(1.0, 20.0)).to(accumulated(dtype))
        empty = draw.normal(batch, heads, q_len) > 1
        return (
            out.masked_fill(empty[..., None], draw.pick(0.0, math.nan)),
            lse.masked_fill(empty, -math.inf),
        )

    def given(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        if form == "packed":
            return draw.place(out[0].transpose(0, 1).contiguous()), draw.place(lse[0])
        out = out.transpose(1, 2).contiguous() if form == "bshd" else out
        return draw.place(out), draw.place(lse)

    states = [state(), state()]
    (out_a, lse_a), (out_b, lse_b) = (given(*x) for x in states)
    arguments = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b,
                 "layout": "bshd" if form == "bshd" else "bhsd"}  # fmt: skip

    def check(result: object) -> None:
        out, lse = result
        if form == "packed":
            out, lse = out.transpose(0, 1)[None], lse[None]
        elif form == "bshd":
            out = out.transpose(1, 2)
        exact, eager = merged(states, torch.float64), merged(states, accumulated(dtype))
        assert_close("out", out, exact[0], [eager[0].to(dtype)])
        assert_close("lse", lse, exact[1], [eager[1]])

    return Call(merge_attention_states, arguments, check, ("merge_attention_states",))


def draw_shared_prefix(draw: Draw) -> Call:
    """Sequences with a common prefix, in two caches of any kinds."""
    dtype, q_len = draw.pick(*DTYPES), draw.pick(1, 1, 3, 7)
    own_values = draw.integer(1, 4) if draw.chance(0.2) else None
    shape = {"heads": draw.integer(1, 4), "dims": draw.head_dims(), "format": None}
    kinds = {"kind": ("dense", "index", "paged"), "lengths_per_head": False}
    caches, places = [], []
    for batch, room in ((1, 0), (draw.pick(1, 2, 3), 0)):
        (make, made_of), place = draw_cache(draw, room, own_values, dtype, batch=batch, **shape,
                                            **kinds)  # fmt: skip
        caches.append((make, make(**made_of)))
        places.append(place)
    prefix, suffix = places
    if int(suffix.lengths.min()) < q_len:  # the queries are tokens of the suffix
        q_len = int(suffix.lengths.min())
    heads = draw.head_count()
    found = maps(draw, heads, shape["heads"], own_values)
    layout, batch = draw.pick("bhsd", "bshd"), len(suffix.begin)
    q = draw.normal(batch, heads, q_len, shape["dims"][0], dtype=dtype)
    arguments = {
        "q": draw.place(q.transpose(1, 2) if layout == "bshd" else q), "prefix": caches[0][1],
        "suffix": caches[1][1], **found["given"], "layout": layout,
        "return_lse": draw.chance(0.5), "backend": draw.pick("auto", "cpu", "reference"),
    }  # fmt: skip
    for name, options in (("scale", (0.1, 1.0)), ("softcap", (1.0, 30.0))):
        if draw.chance(0.3):
            arguments[name] = draw.pick(*options)
    if draw.chance(0.3):
        arguments["sinks"] = draw.normal(heads, size=2.0)
    by = value_heads_by_key(shape["heads"], prefix.v.shape[1])
    scoring = {name: arguments.get(name) for name in ("scale", "softcap")}

    def check(result: object) -> None:
        out, lse = result if arguments["return_lse"] else (result, None)
        out = out.transpose(1, 2) if layout == "bshd" else out
        head_maps = (found["key_map"], found["value_map"])
        for b in range(batch):
            parts = [
                Sequence(q[b], *_keys(place.sequence(i, 0, by), head_maps), causal=causal,
                         **scoring)
                for place, i, causal in ((prefix, 0, False), (suffix, b, True))
            ]  # fmt: skip
            exact = _cascade(parts, EXACT, arguments.get("sinks"), torch.float64)

            def eager(which: int, products, parts=parts):
                return lambda most: [
                    _cascade(parts, x, arguments.get("sinks"), x.scores)[which].to(
                        x.scores if which else dtype
                    )
                    for x in eager_forms(dtype, q.shape[3], products, most)
                ]

            hold("out", out[b], exact[0], eager(0, None))
            if lse is not None:
                hold("lse", lse[b], exact[1], eager(1, accumulated(dtype)))

    names = (*(CACHE_NAMES[make] for make, _ in caches), "shared_prefix_attention")
    return Call(shared_prefix_attention, arguments, check, names)


def _keys(found: tuple, head_maps: tuple) -> tuple:
    k, v, lengths = found
    return k, v, *head_maps, lengths


def _cascade(parts: list[Sequence], precision, sinks: Tensor | None, dtype: torch.dtype):
    """States of the parts, then their merge, then the sinks."""
    out, lse = merged([x.attend(precision) for x in parts], dtype)
    if sinks is None:
        return out, lse
    sink = sinks[:, None].to(lse.dtype).expand_as(lse).masked_fill(lse == -math.inf, -math.inf)
    return merged([(out, lse), (torch.zeros_like(out), sink)], dtype)
