"""Two ranks with parts of the queries and keys give what one call on the whole gives."""

import pytest
import torch
import torch.distributed as dist

from gqa_kernels import DenseKVCache, HeadMap, asym_gqa_attention
from gqa_kernels.parallel.context import (
    context_parallel_attention,
    context_parallel_decode,
    contiguous_ranges,
    merge_over_ranks,
    zigzag_ranges,
)
from gqa_kernels.testing import assert_attention_close
from tests.parallel.ranks import WORLD, run_ranks

HEAD_MAP = HeadMap([0, 2, 0, 1, 0])  # 5 query heads over 3 KV heads
VALUE_MAP = HeadMap([1, 0, 1, 1, 0])
SLOPES = torch.tensor([0.5, 0.25, 0.1, 1.0, 0.0])

# Queries and keys of each rank where they lie behind each other, and the options.
LENGTHS = {
    "uneven": ([9, 4], [9, 4], {"causal": True}),
    "queries of one rank, keys of the other": ([0, 6], [13, 0], {"causal": True}),
    "keys of the second rank only": ([3, 3], [0, 11], {"causal": True}),
    "more keys than queries": ([2, 5], [11, 3], {"causal": True}),
    "more queries than keys": ([9, 4], [2, 5], {"causal": True}),
    "all visible": ([7, 2], [3, 8], {"softcap": 2.0}),
    "window across the cut": ([9, 8], [9, 8], {"causal": True, "window": (4, None)}),
    "window to both sides": ([9, 8], [10, 7], {"window": (3, 2)}),
    "window that ends before the queries": ([1, 2], [14, 1], {"window": (1, 0)}),
    "slopes": ([9, 6], [7, 8], {"causal": True, "alibi_slopes": SLOPES}),
    "slopes of each sequence": (
        [5, 6], [5, 6], {"causal": True, "alibi_slopes": torch.stack([SLOPES, SLOPES.flip(0)])},
    ),
    "heads of V of their own": ([4, 5], [4, 5], {"causal": True, "value_head_map": VALUE_MAP}),
}  # fmt: skip


def tensors(num_queries, num_keys, options, dtype=torch.float64):
    """The whole q, k and v, and a gradient of out and LSE, the same on all ranks."""
    torch.manual_seed(0)
    value_heads = options.get("value_head_map", HEAD_MAP).num_kv_heads
    shapes = [(5, num_queries, 8), (3, num_keys, 8), (value_heads, num_keys, 4)]
    q, k, v = (torch.randn(2, *shape, dtype=dtype) for shape in shapes)
    return q, k, v, torch.randn(2, 5, num_queries, 4, dtype=dtype), torch.rand(2, 5, num_queries)


def positions(ranges, rank, begin=0):
    return torch.cat([torch.arange(b - begin, e - begin) for b, e in ranges[rank]])


def compare(
    rank,
    q_ranges,
    kv_ranges,
    options,
    given,
    bshd=False,
    sinks=None,
    dtype=torch.float64,
    backend="reference",
):
    """Out, LSE and gradients of this rank's tokens against those of one call on all."""
    first = min(begin for entry in q_ranges for begin, _ in entry)
    num_queries, num_keys = (
        sum(e - b for entry in ranges for b, e in entry) for ranges in (q_ranges, kv_ranges)
    )
    *whole, dout, dlse = tensors(num_queries, num_keys, options, dtype)
    rows, columns = positions(q_ranges, rank, first), positions(kv_ranges, rank)
    mine = [x[:, :, at].clone() for x, at in zip(whole, (rows, columns, columns), strict=True)]
    leaves = [x.requires_grad_() for x in whole + mine]
    alone = {} if sinks is None else {"sinks": sinks.clone().requires_grad_()}
    shared = {} if sinks is None else {"sinks": sinks.clone().requires_grad_()}
    out, lse = asym_gqa_attention(
        *whole, HEAD_MAP, backend=backend, return_lse=True, **options, **alone
    )
    if bshd:
        mine = [x.transpose(1, 2) for x in mine]
    ours, our_lse = context_parallel_attention(
        *mine, HEAD_MAP, layout="bshd" if bshd else "bhsd", return_lse=True, backend=backend,
        **options, **shared, **({"q_ranges": q_ranges, "kv_ranges": kv_ranges} if given else {}),
    )  # fmt: skip
    ours = ours.transpose(1, 2) if bshd else ours
    torch.testing.assert_close(ours, out[:, :, rows])
    torch.testing.assert_close(our_lse, lse[:, :, rows])
    seen = lse.isfinite()  # queries without a key have no LSE to differentiate
    (out * dout).sum().add((lse.masked_fill(~seen, 0) * dlse).sum()).backward()
    masked = our_lse.masked_fill(~seen[:, :, rows], 0)
    (ours * dout[:, :, rows]).sum().add((masked * dlse[:, :, rows]).sum()).backward()
    for x, at, y in zip(leaves[:3], (rows, columns, columns), leaves[3:], strict=True):
        torch.testing.assert_close(y.grad, x.grad[:, :, at])
    if sinks is not None:
        dist.all_reduce(shared["sinks"].grad)
        torch.testing.assert_close(shared["sinks"].grad, alone["sinks"].grad)


def prefill(rank):
    for name, (queries, keys, options) in LENGTHS.items():
        begin = sum(keys) - sum(queries)
        ranges = contiguous_ranges(queries, begin), contiguous_ranges(keys)
        try:
            compare(rank, *ranges, options, given=len(name) % 2 == 0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    zigzag = zigzag_ranges(15, WORLD)
    sinks = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    compare(rank, zigzag, zigzag, {"causal": True}, given=True, bshd=True, sinks=sinks)
    # The fused kernels, forward and backward, instead of the reference.
    options = {"causal": True, "window": (9, None), "softcap": 2.0}
    compare(rank, zigzag, zigzag, options, given=True, dtype=torch.float32, backend="auto")
    # In bf16 the tolerance is that of one call, though states are merged.
    q, k, v, *_ = tensors(16, 16, {}, torch.bfloat16)
    zigzag = zigzag_ranges(16, WORLD)
    mine = [x[:, :, positions(zigzag, rank)] for x in (q, k, v)]
    ours = context_parallel_attention(*mine, HEAD_MAP, q_ranges=zigzag, kv_ranges=zigzag)
    gathered = [torch.empty_like(ours) for _ in range(WORLD)]
    dist.all_gather(gathered, ours)
    out = torch.empty_like(q[..., :4])
    for r, rows in enumerate(gathered):
        out[:, :, positions(zigzag, r)] = rows
    assert_attention_close(out, q, k, v, HEAD_MAP)


def decode(rank):
    torch.manual_seed(0)
    lengths = torch.tensor([[7, 0, 3], [4, 6, 0]])  # keys of each sequence on each rank
    q = torch.randn(3, 5, 2, 16)
    k, v = torch.randn(2, WORLD, 3, 3, 8, 16)  # [K or V, rank, B, Hkv, capacity, D]
    cache = DenseKVCache(k[rank], v[rank], lengths[rank].clone())
    sinks = torch.randn(5)
    options = {"softcap": 3.0, "sinks": sinks}
    for newest, q_len in ((None, 1), (0, 2)):
        queries = q[:, :, :q_len]
        call = {"newest": newest, "return_lse": True, **options}
        out, lse = context_parallel_decode(queries, cache, HEAD_MAP, **call)
        swapped = queries.transpose(1, 2)
        other, _ = context_parallel_decode(swapped, cache, HEAD_MAP, layout="bshd", **call)
        torch.testing.assert_close(other.transpose(1, 2), out)
        order = (1, 0) if newest == 0 else (0, 1)  # the newest keys come last
        for b in range(3):
            keys, values = (
                torch.cat([x[r, b, :, : lengths[r, b]] for r in order], 1)[None] for x in (k, v)
            )
            if newest == 0 and lengths[0, b] == 0:
                continue  # the queries' own keys must be there
            expected = asym_gqa_attention(
                queries[b : b + 1], keys, values, HEAD_MAP, causal=True, return_lse=True, **options
            )
            torch.testing.assert_close(out[b : b + 1], expected[0])
            torch.testing.assert_close(lse[b : b + 1], expected[1])
    with pytest.raises(ValueError, match="newest must be given for 2 queries"):
        context_parallel_decode(q, cache, HEAD_MAP)
    with pytest.raises(ValueError, match=r"newest must lie in \[0, 2\), got 2"):
        context_parallel_decode(q, cache, HEAD_MAP, newest=2)
    with pytest.raises(NotImplementedError, match="forward only"):
        context_parallel_decode(q.requires_grad_(), cache, HEAD_MAP, newest=0)


def errors(rank):
    q, k, v, *_ = tensors(4, 4, {})
    ranges = contiguous_ranges([4, 4])

    def call(**options):
        return context_parallel_attention(q, k, v, HEAD_MAP, **options)

    with pytest.raises(ValueError, match=r"q_ranges must have one entry per rank \(2\), got 1"):
        call(q_ranges=ranges[:1], kv_ranges=ranges)
    with pytest.raises(ValueError, match=rf"kv_ranges\[{rank}\] must cover this rank's 4 tokens"):
        call(q_ranges=ranges, kv_ranges=contiguous_ranges([5, 5]))
    with pytest.raises(ValueError, match=r"none of them twice, got \(0, 4\) and \(3, 7\)"):
        call(q_ranges=ranges, kv_ranges=[[(0, 4)], [(3, 7)]])
    with pytest.raises(NotImplementedError, match="must come with causal=True"):
        call(alibi_slopes=SLOPES)
    with pytest.raises(NotImplementedError, match="requires_grad=True"):
        call(alibi_slopes=SLOPES.clone().requires_grad_(), causal=True)
    with pytest.raises(ValueError, match="head_map must have one entry per query head"):
        context_parallel_attention(q, k, v, HeadMap([0, 1, 2]), q_ranges=ranges, kv_ranges=ranges)


def everything(rank):
    prefill(rank)
    decode(rank)
    errors(rank)


def test_two_ranks_equal_one(tmp_path):
    run_ranks(everything, tmp_path)


def test_one_process_alone():
    with pytest.raises(ValueError, match="must be initialised"):
        merge_over_ranks(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1))


def test_zigzag_covers_the_sequence_and_balances_causal_work():
    ranges = zigzag_ranges(16, 4)
    assert sorted(run for entry in ranges for run in entry)[0] == (0, 2)
    work = [sum(p + 1 for b, e in entry for p in range(b, e)) for entry in ranges]
    assert len(set(work)) == 1 and sum(work) == 16 * 17 // 2
