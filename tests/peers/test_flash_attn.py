"""FlashAttention's meaning of its arguments, on even and uneven maps."""

from itertools import product

import numpy as np
import pytest
import torch

from gqa_kernels import HeadMap, flash_attn
from tests.peers import eager

MAPS = {"even": HeadMap.uniform(6, 3), "uneven": HeadMap([0, 2, 0, 1, 0, 2])}
SIZES = ((1, 1), (3, 17), (17, 3), (64, 64), (33, 130))
WINDOWS = ((-1, -1), (5, 0), (3, 7), (-1, 2))


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def visible_keys(queries, keys, causal, window, first=0):
    """``[Sq, Sk]``: aligned to the bottom right, where keys before ``first`` are padding."""
    i = torch.arange(queries)[:, None] + keys - queries
    j = torch.arange(keys)
    left, right = window
    seen = (j >= first).expand(queries, keys)
    if causal or right >= 0:
        seen = seen & (j <= i + (0 if causal else right))
    return seen & (j >= i - left) if left >= 0 else seen


def alibi(slopes, queries, keys):
    i = torch.arange(queries)[:, None] + keys - queries
    return -slopes[..., None, None] * (i - torch.arange(keys)).abs()


def definition(q, k, v, head_map, causal=False, window=(-1, -1), softcap=0.0, slopes=None,
               scale=None, first=0):  # fmt: skip
    """The meaning for ``[B, S, H, D]``, as :func:`eager.check` takes it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seen = visible_keys(q.shape[2], k.shape[2], causal, window, first)
    bias = None if slopes is None else alibi(slopes, q.shape[2], k.shape[2])
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def define(**precision):
        return eager.attention(q, k, v, list(head_map), seen, scale=scale, softcap=softcap,
                               bias=bias, **precision)  # fmt: skip

    return define


@pytest.mark.parametrize("head_map", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal, window", list(product((False, True), WINDOWS)))
def test_dense(head_map, sizes, causal, window):
    queries, keys = sizes
    dtype = torch.bfloat16 if sizes[0] % 2 else torch.float16
    q = random(2, queries, 6, 40, dtype=dtype)
    k, v = (random(2, keys, 3, 40, seed=seed, dtype=dtype) for seed in (1, 2))
    options = {"softcap": 3.0 if causal else 0.0}
    slopes = random(2, 6).abs() if window == (5, 0) else None
    out, lse = flash_attn.flash_attn_func(
        q, k, v, causal=causal, window_size=window, alibi_slopes=slopes, head_map=head_map,
        return_lse=True, **options,
    )  # fmt: skip
    define = definition(q, k, v, head_map, causal, window, slopes=slopes, **options)
    eager.check(out.transpose(1, 2), lse, define, 40)


@pytest.mark.parametrize("head_map", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_varlen(head_map, causal, paged):
    queries, keys = [5, 0, 1, 33], [7, 4, 50, 33]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (queries, keys))
    q = random(sum(queries), 6, 32)
    k, v = (random(sum(keys), 3, 32, seed=seed) for seed in (1, 2))
    given, table = (k, v), None
    if paged:
        table = torch.randperm(16, generator=torch.Generator().manual_seed(0)).view(4, 4).int()
        given = [torch.full((16, 16, 3, 32), torch.nan) for _ in range(2)]
        for pages, x in zip(given, (k, v), strict=True):
            for b in range(4):
                for t in range(keys[b]):
                    pages[table[b, t // 16], t % 16] = x[cu_k[b] + t]
    slopes = random(6).abs()
    out = flash_attn.flash_attn_varlen_func(
        q, *given, cu_q, cu_k, 33, 50, causal=causal, window_size=(20, 0), alibi_slopes=slopes,
        softcap=5.0, block_table=table, head_map=head_map,
    )  # fmt: skip
    for b in range(4):
        own_q, own = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        if queries[b]:
            define = definition(q[None, own_q], k[None, own], v[None, own], head_map, causal,
                                (20, 0), 5.0, slopes)  # fmt: skip
            eager.check(out[None, own_q].transpose(1, 2), None, define, 32)


def rotate(x, cos, sin, positions, interleaved):
    """``[S, H, D]`` rotated in fp32 by rows of the tables."""
    cos, sin, width = cos[positions, None], sin[positions, None], 2 * cos.shape[1]
    if interleaved:
        pairs = x[..., :width].unflatten(-1, (-1, 2))
        a, b = pairs.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = x[..., :width].chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([turned, x[..., width:]], -1)


CACHES = ("dense", "batch index", "paged", "leftpad")


@pytest.mark.parametrize("head_map", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("new", [0, 1, 5])
@pytest.mark.parametrize("rotary", [None, True, False], ids=["plain", "interleaved", "halves"])
def test_kvcache(head_map, cache, new, rotary):
    if rotary is not None and not new:
        return  # new tokens are what is rotated
    lengths, batch, room = torch.tensor([9, 40, 0], dtype=torch.int32), 3, 64
    queries, causal = new or 2, True
    q = random(batch, queries, 6, 32)
    k_new, v_new = (random(batch, new, 3, 32, seed=seed) for seed in (3, 4)) if new else (None,) * 2
    k_cache, v_cache = (random(batch + 2, room, 3, 32, seed=seed) for seed in (1, 2))
    options, index, first = {}, torch.arange(batch), torch.zeros(batch, dtype=torch.int32)
    if cache == "batch index":
        index = torch.tensor([4, 0, 2])
        options["cache_batch_idx"] = index.int()
    if cache == "leftpad":
        first = torch.tensor([2, 11, 0], dtype=torch.int32)
        options["cache_leftpad"] = first
    rows = [k_cache[index].clone(), v_cache[index].clone()]  # [B, room, H, D]
    if cache == "paged":
        table = torch.randperm(12, generator=torch.Generator().manual_seed(0)).view(3, 4)
        options["block_table"] = table.int()
        given = [x.unflatten(1, (4, 16)).flatten(0, 1)[table.flatten().argsort()] for x in rows]
    else:
        given = [k_cache, v_cache] if cache == "batch index" else rows
    given = [x.clone() for x in given]
    cos, sin = random(room, 8).cos(), random(room, 8).sin()
    if rotary is not None:
        options |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": rotary}
    before = lengths.clone()
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, *given, k=k_new, v=v_new, cache_seqlens=lengths, causal=causal, window_size=(30, -1),
        return_softmax_lse=True, head_map=head_map, **options,
    )  # fmt: skip
    assert torch.equal(lengths, before)
    for b in range(batch):
        end = int(lengths[b]) + new
        q_b, positions = q[b], torch.arange(int(lengths[b]), end)
        if new:
            k_b = k_new[b]
            if rotary is not None:
                q_b, k_b = (rotate(x, cos, sin, positions, rotary) for x in (q_b, k_b))
            rows[0][b, end - new : end], rows[1][b, end - new : end] = k_b, v_new[b]
        define = definition(q_b[None], rows[0][b, None, :end], rows[1][b, None, :end], head_map,
                            causal, (30, -1), first=int(first[b]))  # fmt: skip
        eager.check(out[b, None].transpose(1, 2), lse[b, None], define, 32)


@pytest.mark.parametrize("cache", ["dense", "paged", "leftpad"])
@pytest.mark.parametrize("new", [1, 2, 7])
def test_other_numbers_of_new_keys_than_queries(cache, new):
    head_map, lengths, room = MAPS["uneven"], [9, 20], 32
    q = random(2, 4, 6, 32)
    k_new, v_new = (random(2, new, 3, 32, seed=seed) for seed in (3, 4))
    rows = [random(2, room, 3, 32, seed=seed) for seed in (1, 2)]
    given, options, first = [x.clone() for x in rows], {}, [0, 0]
    if cache == "paged":
        options["block_table"] = torch.arange(4).view(2, 2).int()
        given = [x.unflatten(1, (2, 16)).flatten(0, 1) for x in given]
    if cache == "leftpad":
        first = [2, 11]
        options["cache_leftpad"] = torch.tensor(first, dtype=torch.int32)
    out = flash_attn.flash_attn_with_kvcache(
        q, *given, k=k_new, v=v_new, cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        causal=True, head_map=head_map, **options,
    )  # fmt: skip
    for b, length in enumerate(lengths):
        rows[0][b, length : length + new], rows[1][b, length : length + new] = k_new[b], v_new[b]
        keys, values = (x[b, None, : length + new] for x in rows)
        define = definition(q[b, None], keys, values, head_map, True, first=first[b])
        eager.check(out[b, None].transpose(1, 2), None, define, 32)


def test_cache_seqlens_as_a_number_and_as_nothing():
    q, (k, v) = random(2, 1, 6, 32), (random(2, 9, 3, 32, seed=seed) for seed in (1, 2))
    for filled, given in ((9, None), (9, 9), (5, 5)):
        out = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=given)
        define = definition(q, k[:, :filled], v[:, :filled], MAPS["even"])
        eager.check(out.transpose(1, 2), None, define, 32)


def test_gradients_and_numbers_of_other_types():
    """numpy integers and tensors of no dimension are numbers, as in FlashAttention."""
    q, k, v = (random(1, 5, h, 16, seed=h).requires_grad_() for h in (6, 3, 3))
    out = flash_attn.flash_attn_func(
        q, k, v, causal=True, window_size=(np.int64(3), torch.tensor(0)), softcap=np.float32(0)
    )
    same = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(3, 0))
    dout = random(*out.shape)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (out, same)), strict=True):
        assert torch.equal(a, b) and a.any()


ONE_NEW = {"k": random(1, 1, 3, 8), "v": random(1, 1, 3, 8)}
FOUR_NEW = {"k": random(1, 4, 3, 8), "v": random(1, 4, 3, 8)}
TABLES = {"rotary_cos": torch.ones(9, 4), "rotary_sin": torch.ones(9, 4)}
REFUSED = (
    ("flash_attn_func", "return_attn_probs", {"return_attn_probs": True}),
    (
        "flash_attn_varlen_func",
        "dropout_p",
        {"dropout_p": 0.1, "block_table": torch.zeros(1, 1, dtype=torch.int32)},
    ),
    ("flash_attn_varlen_func", "return_attn_probs", {"return_attn_probs": True}),
    ("flash_attn_with_kvcache", "num_splits", {"num_splits": 4}),
    ("flash_attn_with_kvcache", "rotary_cos", {**ONE_NEW, **TABLES, "causal": True}),
    ("flash_attn_with_kvcache", "rotary_cos", {**FOUR_NEW, **TABLES}),
    (
        "flash_attn_with_kvcache",
        "cache_batch_idx",
        {
            "cache_batch_idx": torch.zeros(1, dtype=torch.int32),
            "block_table": torch.zeros(1, 1, dtype=torch.int32),
        },
    ),
)


@pytest.mark.parametrize("function, argument, options", REFUSED)
def test_what_has_no_counterpart_is_refused(function, argument, options):
    q, k = random(1, 4, 6, 8), random(1, 9, 3, 8)
    given = [q, k, k]
    if "varlen" in function:
        cu_q, cu_k = torch.tensor([0, 4]), torch.tensor([0, 9])
        given = [q[0], k[0], k[0], cu_q, cu_k, 4, 9]
    with pytest.raises(NotImplementedError, match=argument):
        getattr(flash_attn, function)(*given, **options)
