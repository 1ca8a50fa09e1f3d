"""SDPA's meaning of its arguments; torch's own function in fp64 is the definition."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from gqa_kernels import HeadMap
from gqa_kernels.sdpa import scaled_dot_product_attention
from tests.peers import eager

UNEVEN = HeadMap([0, 2, 0, 1, 0, 2])
SHAPES = ((1, 1), (5, 5), (5, 17), (17, 5), (64, 130))


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(out, q, k, v, head_map, scale=None, **options):
    """Against torch's function on expanded heads in fp64, and the same in low precision."""
    mask = options.get("attn_mask")
    q_len, kv_len = q.shape[-2], k.shape[-2]
    seen, bias = torch.ones(q_len, kv_len, dtype=torch.bool), None
    if options.get("is_causal"):
        seen = seen.tril()  # top left
    if mask is not None:
        seen, bias = (mask, None) if mask.dtype == torch.bool else (seen, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def define(**precision):
        return eager.attention(q, k, v, list(head_map), seen, scale=scale, bias=bias, **precision)

    wide = [x.double() for x in (q, k[:, list(head_map)], v[:, list(head_map)])]
    if mask is not None and mask.dtype != torch.bool:
        options["attn_mask"] = mask.double()
    theirs = sdpa(*wide, scale=scale, **options)
    torch.testing.assert_close(define()[0], theirs, rtol=1e-10, atol=1e-12)
    eager.check(out, None, define, q.shape[-1])


@pytest.mark.parametrize("head_map", [HeadMap.uniform(6, 3), UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_causal_is_aligned_to_the_top_left(head_map, shape, is_causal, dtype):
    q = random(2, 6, shape[0], 24, dtype=dtype)
    k, v = (random(2, 3, shape[1], dim, seed=dim, dtype=dtype) for dim in (24, 16))
    out = scaled_dot_product_attention(q, k, v, is_causal=is_causal, head_map=head_map)
    check(out, q, k, v, head_map, is_causal=is_causal)


@pytest.mark.parametrize("shape", [(5, 17), (1, 17), (2, 1, 1, 17), (2, 6, 5, 17), (6, 1, 1)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_every_rank(shape, kind):
    q = random(2, 6, 5, 32)
    k, v = (random(2, 3, 17, 32, seed=seed) for seed in (1, 2))
    mask = random(*shape)
    mask = mask > -0.5 if kind == "bool" else mask.masked_fill(mask > 1, -torch.inf)
    mask[..., 0] = True if kind == "bool" else 0.0  # SDPA defines rows without keys differently
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, head_map=UNEVEN)
    check(out, q, k, v, UNEVEN, attn_mask=mask, scale=0.3)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_enable_gqa_is_the_even_map(groups):
    q, k, v = (
        random(2, 6, 9, 32),
        random(2, groups, 9, 32, seed=1),
        random(2, groups, 9, 32, seed=2),
    )
    out = scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)
    check(out, q, k, v, HeadMap.uniform(6, groups), is_causal=True)


@pytest.mark.parametrize("heads", [(), (4,), (1, 4), (2, 4)], ids=str)
def test_leading_dims(heads):
    q, k, v = (random(*heads, 7, 16, seed=seed) for seed in range(3))
    out = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, sdpa(q, k, v))


def test_leading_dims_that_broadcast():
    q, k, v = random(2, 4, 7, 16), random(1, 1, 9, 16, seed=1), random(1, 1, 9, 16, seed=2)
    out = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, sdpa(q, k.expand(2, 4, -1, -1), v.expand(2, 4, -1, -1)))


def test_rows_without_keys_are_zeros_in_both():
    q, k = random(1, 2, 3, 16), random(1, 2, 5, 16, seed=1)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    ours = scaled_dot_product_attention(q, k, k, attn_mask=mask)
    theirs = sdpa(q, k, k, attn_mask=mask)
    assert not ours[:, :, 1].any() and not theirs[:, :, 1].any()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kv_len", [3, 7])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_and_causality_at_once(kv_len, kind):
    """A key must be visible by both."""
    q, k = random(1, 2, 3, 16), random(1, 2, kv_len, 16, seed=1)
    mask = random(3, kv_len) > 0.5 if kind == "bool" else random(3, kv_len)
    mask[:, 0] = True if kind == "bool" else 0.0
    out = scaled_dot_product_attention(q, k, k, attn_mask=mask, is_causal=True)
    torch.testing.assert_close(out, sdpa(q, k, k, attn_mask=mask, is_causal=True))


def test_gradients_are_theirs():
    q, k, v = (random(1, 4, 6, 16, seed=seed).requires_grad_() for seed in range(3))
    dout = random(1, 4, 6, 16, seed=9)
    ours, theirs = (
        torch.autograd.grad(function(q, k, v, is_causal=True), (q, k, v), dout)
        for function in (scaled_dot_product_attention, sdpa)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(5,), (1, 1, 2, 3, 4)], ids=str)
def test_ranks_that_sdpa_has_no_heads_for(shape):
    with pytest.raises(ValueError, match=r"query must have 2 to 4 dimensions"):
        scaled_dot_product_attention(*[random(*shape)] * 3)
