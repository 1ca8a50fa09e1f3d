"""Inputs and the one tolerance rule, for the package's tests and benchmarks and for yours.

The rule (design, section 6): against an exact result, a kernel may be at most twice as wrong as
eager torch in the same precision, plus the rounding of the output::

    max|out - exact| <= 2 * max|eager - exact| + 2 * max|exact + 0.3 - 0.3 - exact|

where the last term, which may vanish by luck on a few elements, is at least one unit in the last
place of the largest.

The exact result is the reference in fp64. Eager torch is the reference with products in the
input's precision, in equivalent forms (scores scaled after or before the product, natural or base-2
units, and orders of summation), of which the largest error counts: on a few numbers one form alone
may err by luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .attention import attention_call
from .backends.reference.cache import dense_call, query_tokens
from .backends.reference.formula import drop, reference_attention, scores_and_values
from .backends.reference.scores import key_scores, max_scores
from .cache.base import KVCache
from .cache.tensors import Layout
from .call.attention import AttentionCall
from .call.auxiliary import AuxOutput
from .call.checks import HeadMapLike
from .decode import decode_call
from .head_map import HeadMap


def make_inputs(
    batch: int,
    head_map: HeadMap,
    q_len: int,
    kv_len: int,
    head_dim: int,
    *,
    value_head_dim: int | None = None,
    value_head_map: HeadMap | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: Layout = "bhsd",
    requires_grad: bool = False,
    strided: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal random q, k, v in ``layout`` for a map.

    Args:
        strided: views into larger tensors whose other elements are NaN, so that a kernel that
            assumes contiguous memory, or reads beyond its rows, shows.

    Examples:
        >>> from gqa_kernels import HeadMap
        >>> from gqa_kernels.testing import make_inputs
        >>> q, k, v = make_inputs(2, HeadMap([0, 0, 1]), q_len=5, kv_len=9, head_dim=16)
        >>> q.shape, k.shape
        (torch.Size([2, 3, 5, 16]), torch.Size([2, 2, 9, 16]))
    """
    generator = torch.Generator().manual_seed(seed)
    value_heads = (value_head_map or head_map).num_kv_heads
    shapes = (
        (batch, head_map.num_heads, q_len, head_dim),
        (batch, head_map.num_kv_heads, kv_len, head_dim),
        (batch, value_heads, kv_len, value_head_dim or head_dim),
    )

    def one(shape: tuple[int, ...]) -> Tensor:
        if layout == "bshd":
            shape = (shape[0], shape[2], shape[1], shape[3])
        x = torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
        if strided:
            room = x.new_full(
                [n + extra for n, extra in zip(shape, (0, 1, 2, 3), strict=True)], torch.nan
            )
            room[:, : shape[1], 1 : shape[2] + 1, : shape[3]] = x
            x = room[:, : shape[1], 1 : shape[2] + 1, : shape[3]]
        return x.requires_grad_(requires_grad)

    q, k, v = (one(shape) for shape in shapes)
    return q, k, v


def assert_close(
    name: str, actual: Tensor, exact: Tensor, eager: list[Tensor], factor: float = 2.0
) -> None:
    """The tolerance rule for one tensor.

    Args:
        name: what to call it in the message.
        actual: the result under test.
        exact: the exact result, fp64, same shape.
        eager: results of eager torch in the precision of ``actual``.
        factor: how many times as wrong as eager ``actual`` may be: 2 for outputs, 3 for gradients.

    Examples:
        >>> import torch
        >>> from gqa_kernels.testing import assert_close
        >>> x = torch.randn(100, dtype=torch.bfloat16)
        >>> exact = x.double().exp()
        >>> assert_close("exp", x.float().exp().bfloat16(), exact, eager=[x.exp()])
    """
    assert actual.shape == exact.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    )
    if actual.numel() == 0:
        return
    bound = factor * max(_max_difference(x, exact) for x in eager)
    bound += _rounding(exact.to(actual.dtype))
    unlike = actual.isfinite() != exact.isfinite()
    unlike |= ~exact.isfinite() & (actual.isnan() != exact.isnan())
    unlike |= exact.isinf() & (actual.double() != exact)
    assert not unlike.any(), (
        f"{name}: {int(unlike.sum())} of {actual.numel()} elements are non-finite where they must "
        f"not be, or the reverse; first at {unlike.nonzero()[0].tolist()}: "
        f"got {actual[unlike][0].item()}, expected {exact[unlike][0].item()}"
    )
    error = (actual.double() - exact).abs().nan_to_num(0.0, 0.0, 0.0)
    worst = error.max().item()
    assert worst <= bound, (
        f"{name}: error {worst:.3e} exceeds {bound:.3e} ({factor} x eager's + rounding) at "
        f"{[int(i) for i in torch.unravel_index(error.argmax(), error.shape)]}"
    )


def assert_attention_close(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_map: HeadMapLike,
    *,
    lse: Tensor | None = None,
    **options: Any,
) -> None:
    """Hold an output (and LSE) of :func:`gqa_kernels.asym_gqa_attention` to the tolerance rule.

    Args:
        out: as returned for ``layout``; likewise ``lse``.
        q, k, v, head_map, options: as given to the call (without ``backend`` and ``return_lse``).

    Examples:
        >>> from gqa_kernels import HeadMap, asym_gqa_attention
        >>> from gqa_kernels.testing import assert_attention_close, make_inputs
        >>> head_map = HeadMap([0, 0, 1])
        >>> q, k, v = make_inputs(2, head_map, q_len=5, kv_len=9, head_dim=16)
        >>> out = asym_gqa_attention(q, k, v, head_map, causal=True)
        >>> assert_attention_close(out, q, k, v, head_map, causal=True)
    """
    inputs = attention_call(q, k, v, head_map, **options)
    if inputs.bshd:
        out = out.transpose(1, 2)
    assert out.dtype == inputs.dtype, f"out: dtype {out.dtype}, expected {inputs.dtype}"
    with torch.no_grad():
        exact_out, exact_lse = reference_attention(upcast(inputs))
        forms = list(equivalent_forms(inputs))
        eager = [reference_attention(form, inputs.dtype, base2)[0] for form, base2 in forms]
        assert_close("out", out, exact_out, eager)
        if lse is not None:
            # Scores are fp32 whatever the input's type, so the LSE is held to fp32.
            eager = [reference_attention(form, None, base2)[1] for form, base2 in forms]
            assert lse.dtype == eager[0].dtype, f"lse: dtype {lse.dtype}"
            assert_close("lse", lse, exact_lse, eager)


GRADIENT_FACTOR = 3.0
DIFFERENTIABLE = ("q", "k", "v", "alibi_slopes", "sinks")


def assert_gradients_close(
    gradients: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_map: HeadMapLike,
    *,
    dout: Tensor | None,
    dlse: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    **options: Any,
) -> None:
    """Hold gradients of :func:`gqa_kernels.asym_gqa_attention` to the tolerance rule, 3 x eager's.

    Args:
        gradients: by name out of ``DIFFERENTIABLE``, each in the shape of its input.
        q, k, v, head_map, options: as given to the call (without ``backend`` and ``return_lse``).
        dout: gradient of the output, in its layout; None where it has none. Rows that see no key
            have an LSE without gradient: their ``dlse`` must be 0.
        dlse: gradient of the LSE, ``[B, Hq, Sq]``, or None.
        dropout_seed: the seed that the call drew, where it had ``dropout_p``.

    Examples:
        >>> import torch
        >>> from gqa_kernels import HeadMap, asym_gqa_attention
        >>> from gqa_kernels.testing import assert_gradients_close, make_inputs
        >>> head_map = HeadMap([0, 0, 1])
        >>> q, k, v = make_inputs(2, head_map, q_len=5, kv_len=9, head_dim=16, requires_grad=True)
        >>> out = asym_gqa_attention(q, k, v, head_map)
        >>> dout = torch.randn_like(out)
        >>> dq, dk = torch.autograd.grad(out, (q, k), dout)
        >>> assert_gradients_close({"q": dq, "k": dk}, q, k, v, head_map, dout=dout)
    """
    given = {"q": q, "k": k, "v": v, **options}
    if dout is not None and options.get("layout") == "bshd":
        dout = dout.transpose(1, 2)

    def leaves_and_inputs(up: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], AttentionCall]:
        call = {**given, **{name: up(given[name].detach()) for name in {*"qkv", *gradients}}}
        leaves = [call[name].requires_grad_() for name in gradients]
        q, k, v = (call.pop(name) for name in "qkv")
        inputs = attention_call(q, k, v, head_map, **call)
        return leaves, inputs.replace(dropout_seed=dropout_seed)

    leaves, inputs = leaves_and_inputs(Tensor.double)
    exact = _autograd_gradients(leaves, inputs, dout, dlse)
    leaves, inputs = leaves_and_inputs(Tensor.clone)
    eager = [
        differentiate(leaves, form, form_dout, dlse, form.dtype, base2)
        for form, form_dout in _gradient_forms(inputs, dout)
        for base2 in (False, True)
        for differentiate in (_autograd_gradients, _fused_gradients)
    ]
    for i, (name, actual) in enumerate(gradients.items()):
        assert actual.dtype == given[name].dtype, f"d{name}: dtype {actual.dtype}"
        assert_close(f"d{name}", actual, exact[i], [e[i] for e in eager], GRADIENT_FACTOR)


def _gradient_forms(
    inputs: AttentionCall, dout: Tensor | None
) -> Iterator[tuple[AttentionCall, Tensor | None]]:
    """The call and its ``dout`` with both head dims in other orders, more where it is small."""
    rows = inputs.q.shape[:3].numel()
    dims = max(inputs.head_dim, inputs.value_head_dim)
    orders = _reorderings(inputs, dims)[: 8 if rows < 256 else 3]
    for shift, reorder in enumerate(orders):
        order = torch.arange(inputs.value_head_dim, device=inputs.device).roll(shift)
        form = reorder(inputs).replace(v=inputs.v[..., order])
        yield form, None if dout is None else dout[..., order]


def _autograd_gradients(
    leaves: list[Tensor],
    inputs: AttentionCall,
    dout: Tensor | None,
    dlse: Tensor | None,
    matmul_dtype: torch.dtype | None = None,
    base2: bool = False,
) -> tuple[Tensor, ...]:
    """What autograd makes of the reference."""
    results = reference_attention(inputs, matmul_dtype, base2)
    pairs = [(x, g) for x, g in zip(results, (dout, dlse), strict=True) if g is not None]
    outputs, grads = zip(*((x, g.to(x.dtype)) for x, g in pairs), strict=True)
    return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)  # forms share parts


def _fused_gradients(
    leaves: list[Tensor],
    inputs: AttentionCall,
    dout: Tensor | None,
    dlse: Tensor | None,
    matmul_dtype: torch.dtype,
    base2: bool,
) -> tuple[Tensor, ...]:
    """The same with the softmax's gradient from the output as it was returned, which is rounded.

    ``dS = P * (dP - rowsum(dout * out) + dlse)``: what kernels do that keep no P
    (FlashAttention-2, arXiv 2307.08691, section 2.3). The scores are those that gave out and LSE,
    bit for bit, and the LSE is in their units: a kernel that recomputes scores in another order, or
    converts the LSE, loses as many digits of the gradients as the scores are large. In particular P
    is exactly 1 where a row sees one key.
    """
    s, v, _ = scores_and_values(inputs, matmul_dtype, base2)
    with torch.no_grad():
        out, _ = reference_attention(inputs, matmul_dtype, base2)
        dout = torch.zeros_like(out) if dout is None else dout
        delta = (dout.to(s.dtype) * out).sum(-1)
        delta = delta if dlse is None else delta - dlse
        p = _probabilities_from_lse(s / math.log(2) if base2 else s, base2)
        dp = drop(inputs, (dout.to(matmul_dtype) @ v.transpose(-1, -2)).to(s.dtype))
        dp = torch.cat([dp, torch.zeros_like(dp[..., :1])] if dp.shape[-1] else [p * 0], -1)
        ds = p * (dp - delta[..., None])
        p = drop(inputs, p[..., :-1]).to(matmul_dtype)
    pairs = [(x, g) for x, g in ((s, ds), (p @ v, dout.to(v.dtype))) if x.requires_grad]
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def _probabilities_from_lse(s: Tensor, base2: bool) -> Tensor:
    """P as kernels recompute it that keep the rows' LSE only; s and the LSE in the same units."""
    exp, log = (torch.exp2, torch.log2) if base2 else (torch.exp, torch.log)
    top = s.amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    z = exp(s - top).sum(-1, keepdim=True)
    return exp(s - (top + log(z)).masked_fill(z == 0, math.inf))


def assert_decode_close(
    out: Tensor,
    q: Tensor,
    cache: KVCache,
    head_map: HeadMapLike,
    *,
    lse: Tensor | None = None,
    **options: Any,
) -> None:
    """Hold an output (and LSE) of :func:`gqa_kernels.asym_gqa_decode` to the tolerance rule.

    The exact result is attention over the values that the cache represents, so that this measures a
    kernel and not the cache's format.

    Args:
        out, lse: as returned for ``layout``.
        q, cache, head_map, options: as given to the call, without new keys: the cache has them.

    Examples:
        >>> import torch
        >>> from gqa_kernels import DenseKVCache, asym_gqa_decode
        >>> from gqa_kernels.testing import assert_decode_close
        >>> cache = DenseKVCache.empty(1, 2, 64, 16, dtype=torch.float32)
        >>> cache.append(*torch.randn(2, 1, 2, 7, 16))
        >>> q = torch.randn(1, 3, 1, 16)
        >>> assert_decode_close(asym_gqa_decode(q, cache, [0, 0, 1]), q, cache, [0, 0, 1])
    """
    inputs = decode_call(q, cache, head_map, **options)
    if cache.key_transform is not None:
        inputs = inputs.replace(q=cache.matching_queries(inputs.q, inputs.head_map_tensor))
    if inputs.q_offsets is not None:
        out, lse = out.transpose(0, 1)[None], None if lse is None else lse[None]
    elif options.get("layout") == "bshd":
        out = out.transpose(1, 2)
    assert_cache_close(out, inputs, lse)


def assert_cache_close(out: Tensor, inputs: AttentionCall, lse: Tensor | None = None) -> None:
    """The same for results as a backend's ``attend`` returns them."""
    assert out.dtype == inputs.dtype, f"out: dtype {out.dtype}, expected {inputs.dtype}"
    dense, unreadable = dense_call(inputs)
    assert not unreadable.any(), "a page id is out of range"
    if inputs.q_offsets is not None:  # compare where there are tokens
        token, valid = query_tokens(inputs)
        token = torch.where(valid, token, 0)
        out = out[0][:, token].transpose(0, 1).masked_fill(~valid[:, None, :, None], 0)
        lse = None if lse is None else lse[0][:, token].transpose(0, 1)
        lse = None if lse is None else lse.masked_fill(~valid[:, None], 0)

    def valid_only(x: Tensor) -> Tensor:
        if inputs.q_offsets is None:
            return x
        return x.masked_fill(~(valid[:, None, :, None] if x.dim() == 4 else valid[:, None]), 0)

    low = dense.replace(k=dense.k.to(inputs.dtype), v=dense.v.to(inputs.dtype))
    with torch.no_grad():
        exact_out, exact_lse = map(valid_only, reference_attention(upcast(dense)))
        forms = list(equivalent_forms(low))
        eager = [valid_only(reference_attention(x, inputs.dtype, base2)[0]) for x, base2 in forms]
        assert_close("out", out, exact_out, eager)
        if lse is not None:
            forms = list(equivalent_forms(low if inputs.kv.format is None else dense))
            eager = [valid_only(reference_attention(x, None, base2)[1]) for x, base2 in forms]
            assert_close("lse", lse, exact_lse, eager)


def assert_auxiliary_close(
    aux: AuxOutput, inputs: AttentionCall, queries: int = 0, exact: AuxOutput | None = None
) -> None:
    """Hold the auxiliary outputs of a call to the tolerance rule. Scores are fp32 whatever the
    input's type, and so is eager torch's largest. Its probabilities have the input's precision.

    Args:
        aux: as ``return_aux`` returned it; what it lacks is not looked at.
        inputs: the call: :func:`~gqa_kernels.attention.attention_call` or
            :func:`~gqa_kernels.decode.decode_call` of its arguments.
        queries: ``AuxRequest.key_scores`` of the request.
        exact: fp64 results; by default the reference's. Packed queries need them.
    """
    one_form = inputs.q_offsets is not None
    if not one_form and inputs.memory != "dense":
        inputs = dense_call(inputs)[0]
    with torch.no_grad():
        forms = [(inputs, False), (inputs, True)] if one_form else [*equivalent_forms(inputs)]
        for name, score in (
            ("max_scores", max_scores),
            ("key_scores", lambda call, *form: key_scores(call, queries, *form)),
        ):
            actual = getattr(aux, name)
            if actual is not None:
                true = score(upcast(inputs)) if exact is None else getattr(exact, name)
                dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
                assert actual.dtype == dtype, f"{name}: dtype {actual.dtype}, expected {dtype}"
                rounded = (True,) if name == "key_scores" else ()
                assert_close(
                    name, actual, true.double(), [score(*form, *rounded) for form in forms]
                )


def equivalent_forms(inputs: AttentionCall) -> Iterator[tuple[AttentionCall, bool]]:
    """The same call in forms that differ by rounding only, as (inputs, base2)."""
    inputs = inputs.replace(batch_invariant=False)  # eager torch as users run it
    for reorder in _reorderings(inputs, inputs.head_dim):
        form = reorder(inputs)
        yield form, False
        yield form, True


def _reorderings(
    inputs: AttentionCall, most: int
) -> list[Callable[[AttentionCall], AttentionCall]]:
    """At most so many other orders of the head dim: other partial sums of q . k. Fewer where a call
    is large."""

    def reordering(shift: int) -> Callable[[AttentionCall], AttentionCall]:
        order = torch.arange(inputs.head_dim, device=inputs.device).roll(shift)
        if shift % 2:
            order = torch.cat([order[::2], order[1::2]])
        return lambda x: x.replace(q=x.q[..., order], k=x.k[..., order])

    few = inputs.q.shape[:3].numel() < 4096
    return [reordering(shift) for shift in range(min(8 if few else 1, most))]


def upcast(inputs: AttentionCall) -> AttentionCall:
    """The same call in fp64, for an exact result."""

    def up(x: Tensor | None) -> Tensor | None:
        return x.double() if x is not None and x.dtype.is_floating_point else x

    names = ("q", "k", "v", "alibi_slopes", "sinks", "attn_mask")
    return inputs.replace(**{name: up(getattr(inputs, name)) for name in names})


def _rounding(x: Tensor) -> float:
    """What rounding alone may do to values like ``x`` in their type."""
    largest = x.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    last_place = torch.finfo(x.dtype).eps * 2.0 ** (math.frexp(largest)[1] - 1)
    return max(2 * _max_difference(x + 0.3 - 0.3, x), last_place)


def _max_difference(x: Tensor, y: Tensor) -> float:
    """Largest difference over the elements that are finite in both."""
    difference = (x.double() - y.double()).abs()
    return difference.nan_to_num(0.0, 0.0, 0.0).max().item()
