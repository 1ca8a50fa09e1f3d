"""Dropout in packed calls, and causality per packed sequence."""

import pytest
import torch

from gqa_kernels import asym_gqa_varlen_attention, explain_backend
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.flash_attn import flash_attn_varlen_func
from gqa_kernels.native.dropout import draw_seed, keep_mask
from gqa_kernels.testing import assert_attention_close, assert_close, assert_gradients_close
from tests.api.test_attention import USABLE
from tests.api.test_key_ranges import KEYS, MAP, QUERIES, RANGED, offsets, part, ranges

DROPPING = [name for name in USABLE if "varlen_dropout" in BACKENDS[name].capabilities.options]
COUNTS = (QUERIES, KEYS, KEYS)
ENDS = (offsets(QUERIES), offsets(KEYS), max(QUERIES), max(KEYS))
WITH_QUERIES = [b for b, n in enumerate(QUERIES) if n]
P = 0.3


def packed(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(sum(counts), heads, 16, generator=generator).to(dtype)
        for counts, heads in zip(COUNTS, (5, 2, 2), strict=True)
    ]


def dropped(q, k, v, keep, form):
    """Causal attention of one sequence by the formula, with the probabilities that stay, in one of
    several forms that round differently."""
    scale, expand = q.shape[-1] ** -0.5, list(MAP.entries)
    s = (q * scale) @ k[:, expand].mT if form % 2 else q @ k[:, expand].mT * scale
    n, keys = s.shape[-2:]
    s = s.masked_fill(torch.ones(n, keys).triu(keys - n + 1).bool(), -torch.inf)
    s = s if s.dtype == torch.float64 else s.float()
    if form < 2:
        p = s.softmax(-1)
    else:
        p = (s - s.logsumexp(-1, keepdim=True)).exp()
    p = p * keep / (1 - P) if form < 4 else p * (keep * (1 / (1 - P)))
    return p.to(q.dtype) @ v[:, expand]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", DROPPING)
def test_dropout_of_packed_sequences(backend, dtype):
    """Which probabilities stay is a function of the seed, the sequence, the head and the numbers of
    query and key in their sequence; gradients see the same."""
    x = [x.requires_grad_() for x in packed(dtype)]
    state = torch.get_rng_state()
    out = asym_gqa_varlen_attention(*x, MAP, *ENDS, causal=True, dropout_p=P, backend=backend)
    dout = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, x, dout)
    torch.set_rng_state(state)
    keep = keep_mask(draw_seed(x[0].device), P, len(QUERIES), 5, max(QUERIES), max(KEYS))
    names = ("out", *"qkv")
    found = {name: [] for name in names}
    by_form = [{name: [] for name in names} for _ in range(7)]  # the first one is exact
    for b in WITH_QUERIES:
        own_keep = keep[b, :, : QUERIES[b], : KEYS[b]]
        for form, results in enumerate(by_form, -1):
            precision = torch.float64 if form < 0 else dtype
            own = [
                part(y.detach(), b, n).to(precision).requires_grad_()
                for y, n in zip(x, COUNTS, strict=True)
            ]
            expected = dropped(*own, own_keep, max(form, 0))
            own_dout = part(dout, b, QUERIES).to(precision)
            values = expected.detach(), *torch.autograd.grad(expected, own, own_dout)
            for name, value in zip(names, values, strict=True):
                results[name].append(value.flatten())
        for name, value, n in zip(names, (out.detach(), *grads), (QUERIES, *COUNTS), strict=True):
            found[name].append(part(value, b, n).flatten())
    exact, *eager = ({n: torch.cat(y) for n, y in results.items()} for results in by_form)
    for name, values in found.items():
        forms = [results[name] for results in eager]
        assert_close(name, torch.cat(values), exact[name], forms, 2.0 if name == "out" else 3.0)


@pytest.mark.parametrize("backend", DROPPING)
def test_what_is_dropped_does_not_depend_on_bounds_of_the_lengths(backend):
    x, found = packed(), []
    for more in (0, 7):
        torch.manual_seed(0)
        found.append(
            asym_gqa_varlen_attention(
                *x, MAP, *ENDS[:2], ENDS[2] + more, ENDS[3] + more, dropout_p=P, backend=backend
            )
        )
    torch.manual_seed(0)
    found.append(flash_attn_varlen_func(*x, *ENDS, dropout_p=P, head_map=MAP))
    assert torch.equal(found[0], found[1])
    if backend == "cpu":
        assert torch.equal(found[0], found[2])


def test_backends_without_dropout_of_packed_sequences_say_so():
    reasons = explain_backend(asym_gqa_varlen_attention, *packed(), MAP, *ENDS, dropout_p=P)
    for name, backend in BACKENDS.items():
        refused = "option varlen_dropout is not supported" in reasons[name]
        assert refused != ("varlen_dropout" in backend.capabilities.options)


@pytest.mark.parametrize("backend", RANGED)
def test_causality_of_each_sequence(backend):
    x = [x.requires_grad_() for x in packed()]
    causal = torch.tensor([True, False, True, False])
    key_ranges = ranges(4, 5, 40, 200)
    for own_ranges, window in ((None, None), (None, (20, 30)), (key_ranges, None)):
        out = asym_gqa_varlen_attention(
            *x, MAP, *ENDS, causal=causal, window=window, key_ranges=own_ranges, backend=backend
        )
        dout = torch.randn(out.shape)
        grads = torch.autograd.grad(out, x, dout)
        for b in WITH_QUERIES:
            own = [part(y.detach(), b, n) for y, n in zip(x, COUNTS, strict=True)]
            options = {"causal": bool(causal[b]), "window": window}
            if own_ranges is not None:
                options["key_ranges"] = own_ranges[b : b + 1, :, : QUERIES[b]]
            assert_attention_close(part(out.detach(), b, QUERIES), *own, MAP, **options)
            found = {
                name: part(grad, b, n) for name, grad, n in zip("qkv", grads, COUNTS, strict=True)
            }
            if backend != "reference":
                assert_gradients_close(found, *own, MAP, dout=part(dout, b, QUERIES), **options)


@pytest.mark.parametrize(
    "causal",
    [torch.ones(3, dtype=torch.bool), torch.ones(4), torch.ones(4, 1, dtype=torch.bool)],
    ids=("length", "dtype", "shape"),
)
def test_bad_causality_is_refused(causal):
    rule = r"causal must be a bool, or a bool tensor of shape \(4,\), got"
    with pytest.raises(ValueError, match=rule):
        asym_gqa_varlen_attention(*packed(), MAP, *ENDS, causal=causal)


def test_causality_of_each_sequence_with_any_bound():
    """A bound says how long a sequence may be; no memory is taken by it."""
    given = (*packed(), MAP, *ENDS[:2])
    causal = torch.tensor([True, False, True, False])
    expected = asym_gqa_varlen_attention(*given, *ENDS[2:], causal=causal)
    for bound in (sum(QUERIES) + 1, 2**40, 2**70):
        out = asym_gqa_varlen_attention(*given, bound, ENDS[3], causal=causal)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for name, ends in (
        ("cu_seqlens_q", (torch.tensor(0), ENDS[1])),
        ("cu_seqlens_q", (ENDS[0][:-1], ENDS[1])),
        ("cu_seqlens_q", (ENDS[0].float(), ENDS[1])),
        ("cu_seqlens_k", (ENDS[0], ENDS[1].float())),
    ):
        with pytest.raises((ValueError, TypeError), match=f"{name} must"):
            asym_gqa_varlen_attention(*packed(), MAP, *ends, *ENDS[2:], causal=causal)


@pytest.mark.parametrize("option", ["attn_mask", "key_ranges"])
@pytest.mark.parametrize("backend", USABLE)
def test_bounds_above_all_tokens(backend, option):
    """Masks and ranges have the sizes of the caller's bounds, which may exceed all the tokens."""
    q, k, v = torch.randn(4, 3, 8), *torch.randn(2, 5, 2, 8)
    given = (q, k, v, [0, 0, 1], torch.tensor([0, 1, 4]), torch.tensor([0, 2, 5]))
    if option == "attn_mask":
        wide = torch.rand(2, 1, 9, 8) < 0.7
        narrow = wide[..., :3, :3]
    else:
        wide = torch.tensor([0, 1]) + torch.randint(0, 3, (2, 3, 9, 1))
        narrow = wide[:, :, :3]
    if explain_backend(asym_gqa_varlen_attention, *given, 3, 3, **{option: narrow})[backend]:
        pytest.skip(f"{backend} has no {option} in packed calls")
    out, expected = (
        asym_gqa_varlen_attention(*given, *bounds, **{option: x}, backend=backend)
        for bounds, x in (((9, 8), wide), ((3, 3), narrow))
    )
    torch.testing.assert_close(out, expected)
