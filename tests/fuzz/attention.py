"""asym_gqa_attention, its gradients, and asym_gqa_varlen_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_kernels import AuxOutput, AuxRequest, asym_gqa_attention, asym_gqa_varlen_attention

from .draw import DTYPES, Call, Draw, per_sequence, with_ranges
from .oracle import Sequence, check_attention, check_gradients, check_scores, keep_mask

QUERY_COUNTS = (0, 1, 1, 1, 2, 3, 5, 7, 16, 17, 33, 40, 70)
KEY_COUNTS = (0, 1, 2, 3, 5, 15, 17, 31, 64, 65, 100, 130, 257, 300)


def maps(draw: Draw, heads: int, kv_heads: int, value_heads: int | None) -> dict[str, object]:
    """The map of K, that of V (None: it follows K), and both as a call takes them."""
    entries = draw.entries(heads, kv_heads)
    value = None if value_heads is None else draw.entries(heads, value_heads)
    given = {"head_map": draw.given_map(entries, kv_heads)}
    if value is not None:
        given["value_head_map"] = draw.given_map(value, value_heads)
    return {"key_map": entries, "value_map": entries if value is None else value, "given": given}


def backend_and_dtype(draw: Draw) -> tuple[str, torch.dtype]:
    backend = draw.pick("auto", "auto", "cpu", "cpu", "cpu", "reference")
    dtype = draw.pick(*DTYPES)
    return backend, torch.float64 if backend == "reference" and draw.chance(0.2) else dtype


def options_of_sequence(given: dict[str, object], b: int) -> dict[str, object]:
    """Scoring options of a call as the oracle takes them, for sequence ``b``."""
    names = ("causal", "scale", "window", "softcap", "sinks")
    options = {name: given[name] for name in names if name in given}
    return options | {"slopes": per_sequence(given.get("alibi_slopes"), b)}


def differentiable(draw: Draw, arguments: dict[str, object], names: tuple[str, ...]) -> list[str]:
    """Make some of the tensors require gradients; their names."""
    chosen = [name for name in names if name in arguments and draw.chance(0.7)]
    for name in chosen:
        arguments[name].requires_grad_()
    return chosen


def work_is_small(heads: int, batch: int, queries: int, keys: int, dim: int) -> bool:
    return heads * batch * queries * max(keys, 1) * dim < 1e7


def draw_attention(draw: Draw) -> Call:
    """Dense attention, with gradients or without."""
    heads, kv_heads = draw.head_count(), draw.integer(1, 6)
    value_heads = draw.integer(1, 6) if draw.chance(0.3) else None
    batch, q_len, kv_len = (
        draw.pick(0, 1, 1, 2, 3),
        draw.pick(*QUERY_COUNTS),
        draw.pick(*KEY_COUNTS),
    )
    dim, value_dim = draw.head_dims()
    if not work_is_small(heads, batch, q_len, kv_len, dim):
        q_len = min(q_len, 7)
    found = maps(draw, heads, kv_heads, value_heads)
    backend, dtype = backend_and_dtype(draw)
    layout = draw.pick("bhsd", "bshd")
    size = draw.pick(1.0, 1.0, 0.1, 4.0)

    def tensor(count: int, tokens: int, dim: int) -> Tensor:
        x = draw.normal(batch, count, tokens, dim, dtype=dtype, size=size)
        return draw.place(x.transpose(1, 2) if layout == "bshd" else x)

    arguments = {
        "q": tensor(heads, q_len, dim), "k": tensor(kv_heads, kv_len, dim),
        "v": tensor(value_heads or kv_heads, kv_len, value_dim), **found["given"],
        **draw.scoring(heads, batch), "causal": draw.chance(0.5), "layout": layout,
        "return_lse": draw.chance(0.5), "backend": backend,
    }  # fmt: skip
    if draw.chance(0.25):
        arguments["attn_mask"] = draw.mask((batch, heads, q_len, kv_len), dtype)
    if draw.chance(0.2):
        arguments["key_ranges"] = draw.key_ranges(batch, heads, q_len, kv_len)
    lengths = torch.full((batch, kv_heads), kv_len)
    if draw.chance(0.3):
        shape = (batch, kv_heads) if draw.chance(0.5) else (batch, 1)
        lengths = draw.integers(0, kv_len, *shape).expand(batch, kv_heads)
        given = lengths if shape[1] == kv_heads else lengths[:, 0]
        given = given.to(draw.pick(torch.int32, torch.int64))
        arguments["kv_lengths"] = draw.place(given) if draw.chance(0.7) else given.tolist()
    if draw.chance(0.15):
        arguments["dropout_p"] = draw.pick(0.1, 0.5, 0.9)
    wanted = ()
    if draw.chance(0.35) and batch and q_len:
        wanted = differentiable(draw, arguments, ("q", "k", "v", "alibi_slopes", "sinks"))
    seed = draw.integer(0, 2**40)
    request = None
    if not arguments["return_lse"] and draw.chance(0.2):
        request = AuxRequest(draw.chance(0.5), draw.chance(0.5), draw.pick(0, 0, 1, 3, 100))
        arguments["return_aux"] = request

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if layout == "bshd" else x

    def sequences() -> list[Sequence]:
        keep, dropout_p = None, arguments.get("dropout_p", 0.0)
        if dropout_p:
            torch.manual_seed(seed)
            key, offset = torch.randint(2**63 - 1, (2,), dtype=torch.int64).tolist()
            keep = keep_mask(key, offset, dropout_p, batch, heads, q_len, kv_len)
        mask = arguments.get("attn_mask")
        mask = with_ranges(mask, arguments.get("key_ranges"), kv_len)
        mask = None if mask is None else mask.expand(batch, heads, q_len, kv_len)
        plain = {name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        q, k, v = (heads_first(plain[name]) for name in "qkv")
        return [
            Sequence(
                q[b], k[b], v[b], found["key_map"], found["value_map"], lengths[b].tolist(),
                mask=None if mask is None else mask[b], keep=None if keep is None else keep[b],
                dropout_p=dropout_p, **options_of_sequence(plain, b),
            )
            for b in range(batch)
        ]  # fmt: skip

    def call(**arguments):
        torch.manual_seed(seed)
        return asym_gqa_attention(**arguments)

    def check(result: object) -> None:
        out, lse = result if arguments["return_lse"] or request else (result, None)
        expected = sequences()
        if request:
            assert isinstance(lse, AuxOutput)
            aux, lse = lse, lse.lse
            wanted_fields = (request.lse, request.max_scores, request.key_scores > 0)
            assert tuple(x is not None for x in aux) == wanted_fields, f"return_aux: {aux}"
            check_scores(expected, aux.max_scores, aux.key_scores, request.key_scores)
        shape = (batch, heads, q_len, value_dim)
        assert heads_first(out).shape == shape, f"out: shape {tuple(out.shape)}"
        if lse is not None:
            assert lse.shape == shape[:3], f"lse: shape {tuple(lse.shape)}"
        with torch.no_grad():
            detached = None if lse is None else lse.detach()
            check_attention(expected, heads_first(out.detach()), detached)
        if wanted:
            dout = draw.normal(*shape, dtype=dtype)
            dlse = draw.normal(*shape[:3], dtype=torch.float32)
            dlse = torch.zeros_like(dlse) if lse is None else dlse.masked_fill(lse.isinf(), 0)
            outputs, grads = [heads_first(out)], [dout]
            if lse is not None and lse.requires_grad:  # not if only V has a gradient
                outputs.append(lse)
                grads.append(dlse.to(lse.dtype))
            inputs = [arguments[name] for name in wanted]
            found_grads = torch.autograd.grad(outputs, inputs, grads)
            named = dict(zip(wanted, found_grads, strict=True))
            hold_gradients(expected, dout, dlse, named, heads_first)

    call.__wrapped__ = asym_gqa_attention
    names = ("AuxRequest", "AuxOutput") if request else ()
    return Call(call, arguments, check, ("HeadMap", *names, "asym_gqa_attention"))


def hold_gradients(expected, dout: Tensor, dlse: Tensor, named: dict, heads_first) -> None:
    """Gradients of a dense call: those of slopes and sinks that sequences share are summed."""
    parts = {name: list(heads_first(x)) for name, x in named.items() if name in "qkv"}
    parts |= {name: list(x) for name, x in named.items() if name == "alibi_slopes" and x.dim() == 2}
    check_gradients(expected, list(dout), list(dlse), parts)
    shared = {name: x for name, x in named.items() if name not in parts}
    if shared:
        check_gradients([Batch(expected)], [dout], [dlse], {n: [x] for n, x in shared.items()})


class Batch:
    """Sequences as one, for gradients of what they share."""

    def __init__(self, sequences: list[Sequence]):
        self.sequences, self.q, self.v = sequences, sequences[0].q, sequences[0].v

    def gradients(self, precision, douts, dlses) -> dict[str, Tensor]:
        each = [
            x.gradients(precision, dout, dlse)
            for x, dout, dlse in zip(self.sequences, douts, dlses, strict=True)
        ]
        return {name: sum(x[name] for x in each) for name in ("alibi_slopes", "sinks")}


def draw_varlen(draw: Draw) -> Call:
    """Packed sequences, with gradients or without."""
    heads, kv_heads = draw.head_count(), draw.integer(1, 6)
    value_heads = draw.integer(1, 6) if draw.chance(0.3) else None
    batch = draw.pick(1, 2, 3, 5)
    queries = [draw.pick(*QUERY_COUNTS[:10]) for _ in range(batch)]
    keys = [draw.pick(*KEY_COUNTS[:11]) for _ in range(batch)]
    dim, value_dim = draw.head_dims()
    found = maps(draw, heads, kv_heads, value_heads)
    backend, dtype = backend_and_dtype(draw)
    surplus = draw.pick(0, 0, 3)
    total_q, total_k = sum(queries) + surplus, sum(keys) + surplus
    cu_q, cu_k = (torch.tensor([0, *counts]).cumsum(0) for counts in (queries, keys))

    def tensor(total: int, count: int, dim: int) -> Tensor:
        return draw.place(draw.normal(total, count, dim, dtype=dtype))

    offset_type = draw.pick(torch.int32, torch.int64)
    arguments = {
        "q": tensor(total_q, heads, dim), "k": tensor(total_k, kv_heads, dim),
        "v": tensor(total_k, value_heads or kv_heads, value_dim), **found["given"],
        "cu_seqlens_q": draw.place(cu_q.to(offset_type)),
        "cu_seqlens_k": draw.place(cu_k.to(offset_type)),
        "max_seqlen_q": max(queries) + draw.pick(0, 0, 5),
        "max_seqlen_k": max(keys) + draw.pick(0, 0, 5),
        **draw.scoring(heads, batch), "causal": draw.chance(0.5),
        "return_lse": draw.chance(0.5), "backend": backend,
    }  # fmt: skip
    most_q, most_k = arguments["max_seqlen_q"], arguments["max_seqlen_k"]
    causal = [arguments["causal"]] * batch
    if draw.chance(0.2):
        causal = [draw.chance(0.5) for _ in range(batch)]
        arguments["causal"] = draw.place(torch.tensor(causal))
    if draw.chance(0.2):
        arguments["key_ranges"] = draw.key_ranges(batch, heads, most_q, most_k)
    if draw.chance(0.2):
        arguments["attn_mask"] = draw.mask((batch, heads, most_q, most_k), dtype)
    if draw.chance(0.2):
        arguments["dropout_p"] = draw.pick(0.1, 0.5, 0.9)
    seed = draw.integer(0, 2**40)
    wanted = ()
    if draw.chance(0.35):
        wanted = differentiable(draw, arguments, ("q", "k", "v", "alibi_slopes", "sinks"))

    def parts(x: Tensor, offsets: Tensor, dim: int = 0) -> list[Tensor]:
        """Each sequence's, heads first."""
        cut = [slice(a, b) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())]  # noqa: B905
        return [x[:, part] if dim else x[part].transpose(0, 1) for part in cut]

    def check(result: object) -> None:
        out, lse = result if arguments["return_lse"] else (result, None)
        assert out.shape == (total_q, heads, value_dim), f"out: shape {tuple(out.shape)}"
        plain = {name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        q, k, v = parts(plain["q"], cu_q), parts(plain["k"], cu_k), parts(plain["v"], cu_k)
        mask = with_ranges(arguments.get("attn_mask"), arguments.get("key_ranges"), most_k)
        mask = None if mask is None else mask.expand(batch, heads, most_q, most_k)
        keep, dropout_p = None, arguments.get("dropout_p", 0.0)
        if dropout_p:
            torch.manual_seed(seed)
            key, offset = torch.randint(2**63 - 1, (2,), dtype=torch.int64).tolist()
            keep = keep_mask(key, offset, dropout_p, batch, heads, most_q, most_k)

        def own(x: Tensor | None, b: int) -> Tensor | None:
            return None if x is None else x[b, :, : queries[b], : keys[b]]

        expected = [
            Sequence(
                q[b], k[b], v[b], found["key_map"], found["value_map"], [keys[b]] * kv_heads,
                mask=own(mask, b), keep=own(keep, b), dropout_p=dropout_p,
                **options_of_sequence(plain, b) | {"causal": causal[b]},
            )
            for b in range(batch)
        ]  # fmt: skip
        lses = None if lse is None else parts(lse.detach(), cu_q, 1)
        check_attention(expected, parts(out.detach(), cu_q), lses)
        if not wanted:
            return
        dout = draw.normal(total_q, heads, value_dim, dtype=dtype)
        dout[sum(queries) :] = 0
        outputs, grads, dlse = [out], [dout], torch.zeros(heads, total_q)
        if lse is not None:
            dlse = draw.normal(heads, total_q).masked_fill(lse.detach().isinf(), 0)
            dlse[:, sum(queries) :] = 0
            if lse.requires_grad:  # not if only V has a gradient
                outputs, grads = [out, lse], [dout, dlse.to(lse.dtype)]
        values = torch.autograd.grad(outputs, [arguments[name] for name in wanted], grads)
        named = dict(zip(wanted, values, strict=True))
        for name in set(wanted) & set("qkv"):
            end = sum(queries) if name == "q" else sum(keys)
            assert not named[name][end:].any(), f"d{name} at tokens of no sequence"
        split = {n: parts(x, cu_q if n == "q" else cu_k) for n, x in named.items() if n in "qkv"}
        if "alibi_slopes" in named and named["alibi_slopes"].dim() == 2:
            split["alibi_slopes"] = list(named["alibi_slopes"])
        douts, dlses = parts(dout, cu_q), parts(dlse, cu_q, 1)
        check_gradients(expected, douts, dlses, split)
        shared = {n: [x] for n, x in named.items() if n not in split}
        if shared:
            check_gradients([Batch(expected)], [douts], [dlses], shared)

    def call(**arguments):
        torch.manual_seed(seed)
        return asym_gqa_varlen_attention(**arguments)

    call.__wrapped__ = asym_gqa_varlen_attention
    return Call(call, arguments, check, ("HeadMap", "asym_gqa_varlen_attention"))
