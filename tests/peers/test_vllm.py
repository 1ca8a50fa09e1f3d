"""vLLM's meaning of its arguments: block tables, sequence lengths, fp8 caches, sinks."""

import inspect

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.decode import asym_gqa_decode
from tests.peers import eager, vllm

MAPS = {"even": HeadMap.uniform(8, 2), "uneven": HeadMap([0, 1, 1, 1, 0, 1, 1, 1])}
LENGTHS = [1, 33, 0, 64]
BLOCKS = 24


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def paged(block_size, dim=32, dtype=torch.float32, fp8=None):
    """K, V as blocks, the block table with -1 beyond, and each sequence's tokens in fp32."""
    caches = [random(BLOCKS, block_size, 2, dim, seed=seed, dtype=dtype) for seed in (1, 2)]
    if fp8:
        caches = [x.to(fp8) for x in caches]
    most = -(-max(LENGTHS) // block_size)
    table = torch.full((len(LENGTHS), most), -1, dtype=torch.int32)
    order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(3)).int()
    for b, length in enumerate(LENGTHS):
        count = -(-length // block_size)
        table[b, :count], order = order[:count], order[count:]
    tokens = [
        [x.float()[table[b][: -(-n // block_size)]].flatten(0, 1)[:n] for x in caches]
        for b, n in enumerate(LENGTHS)
    ]
    return (*caches, table, tokens)


def definition(q, k, v, head_map, scale, window=(-1, -1), softcap=0.0, slopes=None, sinks=None):
    """Causal attention of the last tokens ``q [S, Hq, D]`` of a sequence ``k [n, Hk, D]``."""
    n, queries = len(k), len(q)
    i, j = torch.arange(n - queries, n)[:, None], torch.arange(n)
    seen = j <= i
    if window[0] >= 0:
        seen = seen & (i - j <= window[0])
    bias = None if slopes is None else slopes[:, None, None] * (j - i)
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]

    def define(**precision):
        return eager.attention(*heads_first, list(head_map), seen, scale=scale, softcap=softcap,
                               bias=bias, sinks=sinks, **precision)  # fmt: skip

    return define


@pytest.mark.parametrize("head_map", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("with_alibi", [False, True])
def test_paged_decode(head_map, block_size, dtype, with_alibi):
    k, v, table, tokens = paged(block_size, dtype=dtype)
    q, slopes = random(len(LENGTHS), 8, 32, dtype=dtype), random(8).abs() if with_alibi else None
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    out = vllm.paged_attention(q, k, v, 2, 0.2, table, lengths, block_size, max(LENGTHS), slopes,
                               head_map=head_map)  # fmt: skip
    for b, (keys, values) in enumerate(tokens):
        define = definition(q[b, None], keys, values, head_map, 0.2, slopes=slopes)
        eager.check(out[b, None].transpose(0, 1)[None], None, define, 32)


@pytest.mark.parametrize("kind", ["fp8", "fp8_e5m2"])
def test_paged_decode_of_an_fp8_cache(kind):
    storage = vllm.FORMATS[kind]
    k, v, table, tokens = paged(16, fp8=storage)
    q = random(len(LENGTHS), 8, 32, dtype=torch.bfloat16)
    out = vllm.paged_attention(
        q, k.view(torch.uint8), v.view(torch.uint8), 2, 0.2, table, torch.tensor(LENGTHS), 16,
        max(LENGTHS), kv_cache_dtype=kind, k_scale=0.5, v_scale=2.0, head_map=MAPS["uneven"],
    )  # fmt: skip
    for b, (keys, values) in enumerate(tokens):
        define = definition(q[b, None], keys * 0.5, values * 2.0, MAPS["uneven"], 0.2)
        eager.check(out[b, None].transpose(0, 1)[None], None, define, 32)


@pytest.mark.parametrize("head_map", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("queries", [[1, 1, 0, 1], [1, 33, 0, 5], [0, 7, 0, 64]], ids=str)
@pytest.mark.parametrize("window", [(-1, -1), (15, 0)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 10.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_chunks_and_decode_in_one_batch(head_map, queries, window, softcap, with_sinks):
    k, v, table, tokens = paged(16)
    cu = torch.tensor([0, *queries]).cumsum(0).int()
    q, sinks = random(sum(queries), 8, 32), random(8) if with_sinks else None
    memory = torch.empty_like(q)
    out = vllm.unified_attention(
        q, k, v, cu, max(queries), torch.tensor(LENGTHS, dtype=torch.int32), max(LENGTHS), 0.2,
        True, window, table, softcap, sinks=sinks, out=memory, head_map=head_map,
    )  # fmt: skip
    assert out is memory
    for b, (keys, values) in enumerate(tokens):
        own = slice(cu[b], cu[b + 1])
        if queries[b]:
            define = definition(q[own], keys, values, head_map, 0.2, window, softcap, sinks=sinks)
            eager.check(out[own].transpose(0, 1)[None], None, define, 32)


def test_reshape_and_cache():
    """Padding has slot -1."""
    k, v, _, _ = paged(16)
    slots = torch.tensor([17, -1, 3, 64])
    new = random(4, k.shape[2], 32), random(4, k.shape[2], 32)
    expected = [x.clone().flatten(0, 1) for x in (k, v)]
    for x, y in zip(expected, new, strict=True):
        x[slots[slots >= 0]] = y[slots >= 0]
    vllm.reshape_and_cache(*new, k, v, slots)
    for x, y in zip((k, v), expected, strict=True):
        assert torch.equal(x.flatten(0, 1), y)


@pytest.mark.parametrize("which", vllm.MISSING, ids="-".join)
def test_what_cannot_be_said_is_refused(which):
    function, argument = which
    k, v, table, _ = paged(16)
    q, lengths = random(len(LENGTHS), 8, 32), torch.tensor(LENGTHS)
    value = {"k_descale": torch.ones(4, 2)}.get(argument, torch.ones(1))
    with pytest.raises(NotImplementedError, match=argument):
        if function == "unified_attention":
            cu = torch.arange(5)
            vllm.unified_attention(q, k, v, cu, 1, lengths, 64, 0.2, True, (-1, -1), table, 0.0,
                                   **{argument: value})  # fmt: skip
        else:
            vllm.paged_attention(q, k, v, 2, 0.2, table, lengths, 16, 64, **{argument: 16})


def test_and_is_still_missing():
    """When ours takes such an argument the shim must pass it on."""
    parameters = inspect.signature(asym_gqa_decode).parameters
    assert not {"q_scale", "q_descale"} & set(parameters)
    k, v, table, _ = paged(16)
    with pytest.raises(ValueError, match="k_scale must have"):
        stored = [x.to(torch.float8_e4m3fn) for x in (k, v)]
        vllm.PagedKVCache(*stored, table, torch.tensor(LENGTHS), order="NHD",
                          k_scale=torch.ones(4, 2), v_scale=torch.ones(4, 2))  # fmt: skip
