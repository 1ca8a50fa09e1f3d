"""Ranks with parts of the tokens give what one call on the whole gives; also inside a ring."""

import pytest
import torch
import torch.distributed as dist

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.parallel.context import zigzag_ranges
from gqa_kernels.parallel.ulysses import ulysses_attention
from gqa_kernels.testing import assert_attention_close
from tests.parallel.ranks import run_ranks

WORLD = 3
HEAD_MAP = HeadMap([0, 2, 0, 1, 0, 3, 2])  # 7 query heads over 4 KV heads, on 3 ranks
VALUE_MAP = HeadMap([1, 0, 1, 1, 0, 0, 0], 3)  # value head 2 is read by nobody
SLOPES = torch.tensor([0.5, 0.25, 0.1, 1.0, 0.0, 0.3, 0.2])

# Queries and keys of each rank, and the options.
CALLS = {
    "plain": ([4, 4, 4], [4, 4, 4], {}),
    "lengths that differ": ([9, 4, 1], [9, 4, 1], {"causal": True}),
    "ranks without tokens": ([0, 6, 2], [5, 0, 6], {"causal": True}),
    "more keys than queries": ([2, 1, 2], [7, 9, 1], {"causal": True, "softcap": 2.0}),
    "window": ([5, 6, 7], [5, 6, 7], {"causal": True, "window": (4, None)}),
    "slopes": ([4, 3, 2], [4, 3, 2], {"causal": True, "alibi_slopes": SLOPES}),
    "slopes of each sequence": (
        [4, 3, 2], [2, 3, 4], {"alibi_slopes": torch.stack([SLOPES, SLOPES.flip(0)])},
    ),
    "heads of V of their own": ([4, 3, 2], [2, 3, 4], {"value_head_map": VALUE_MAP, "scale": 0.3}),
    "even groups": ([4, 3, 2], [4, 3, 2], {"head_map": HeadMap([0, 0, 1, 1, 2, 2, 3])}),
}  # fmt: skip


def tensors(num_queries, num_keys, value_map, dtype=torch.float64):
    """The whole q, k and v, sinks, and a gradient of out and LSE, the same on all ranks."""
    torch.manual_seed(0)
    value_heads = 4 if value_map is None else value_map.num_kv_heads
    shapes = [(7, num_queries, 8), (4, num_keys, 8), (value_heads, num_keys, 4)]
    q, k, v = (torch.randn(2, *shape, dtype=dtype) for shape in shapes)
    sinks = torch.randn(7, dtype=torch.float32)
    return q, k, v, sinks, torch.randn(2, 7, num_queries, 4, dtype=dtype)


def compare(rows, columns, whole_lengths, options, *, bshd=False, with_sinks=False, **ours):
    """Out, LSE and gradients of the tokens at these positions against those of one call on all."""
    options = {"head_map": HEAD_MAP, **options}
    *whole, sinks, dout = tensors(*whole_lengths, options.get("value_head_map"))
    dlse = torch.rand(dout.shape[:3], generator=torch.Generator().manual_seed(1))
    mine = [x[:, :, at].clone() for x, at in zip(whole, (rows, columns, columns), strict=True)]
    leaves = [x.requires_grad_() for x in whole + mine]
    alone, shared = {}, {}
    if with_sinks:
        alone, shared = ({"sinks": sinks.clone().requires_grad_()} for _ in range(2))
    how = {"return_lse": True, "backend": "reference", **options}
    out, lse = asym_gqa_attention(*whole, **how, **alone)
    given = [x.transpose(1, 2) for x in mine] if bshd else mine
    layout = "bshd" if bshd else "bhsd"
    got, got_lse = ulysses_attention(*given, layout=layout, **how, **shared, **ours)
    got = got.transpose(1, 2) if bshd else got
    torch.testing.assert_close(got, out[:, :, rows])
    torch.testing.assert_close(got_lse, lse[:, :, rows])
    ((out * dout).sum() + (lse * dlse).sum()).backward()
    ((got * dout[:, :, rows]).sum() + (got_lse * dlse[:, :, rows]).sum()).backward()
    for x, at, y in zip(leaves[:3], (rows, columns, columns), leaves[3:], strict=True):
        torch.testing.assert_close(y.grad, x.grad[:, :, at])
    if with_sinks:
        dist.all_reduce(shared["sinks"].grad)
        torch.testing.assert_close(shared["sinks"].grad, alone["sinks"].grad)


def own(lengths, rank):
    return torch.arange(sum(lengths[:rank]), sum(lengths[: rank + 1]))


def three_ranks(rank):
    for i, (name, (queries, keys, options)) in enumerate(CALLS.items()):
        ours = {"q_lengths": queries, "kv_lengths": keys} if i % 2 else {}
        try:
            compare(
                own(queries, rank), own(keys, rank), (sum(queries), sum(keys)), options,
                bshd=i % 3 == 1, with_sinks=i % 2 == 0, **ours,
            )  # fmt: skip
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    fused_kernels(rank)
    errors(rank)


def fused_kernels(rank):
    """bf16, with the tolerance of one call; each rank's map is its shard's."""
    lengths = [11, 7, 14]
    q, k, v, *_ = tensors(32, 32, None, torch.bfloat16)
    mine = [x[:, :, own(lengths, rank)] for x in (q, k, v)]
    ours = ulysses_attention(*mine, list(HEAD_MAP), causal=True)
    gathered = [torch.empty(2, 7, n, 4, dtype=q.dtype) for n in lengths]
    for source, buffer in enumerate(gathered):
        dist.broadcast(buffer.copy_(ours) if source == rank else buffer, source)
    assert_attention_close(torch.cat(gathered, 2), q, k, v, HEAD_MAP, causal=True)


def errors(rank):
    q, k, v, *_ = tensors(4, 4, None)
    with pytest.raises(ValueError, match=r"q_lengths must have one entry per rank \(3\), got 2"):
        ulysses_attention(q, k, v, HEAD_MAP, q_lengths=[4, 4], kv_lengths=[4, 4, 4])
    with pytest.raises(ValueError, match=r"tokens \(4\), got 5"):
        ulysses_attention(q, k, v, HEAD_MAP, q_lengths=[4, 4, 4], kv_lengths=[5, 5, 5])
    with pytest.raises(ValueError, match="must come with a ring_group"):
        ulysses_attention(q, k, v, HEAD_MAP, q_ranges=[[(0, 4)]])
    with pytest.raises(ValueError, match=r"world must lie in \[1, 2\], got 3"):
        ulysses_attention(q[:, :2], k, v, HeadMap([0, 3]))


def four_ranks(rank):
    """Two rings of two ranks each, across two groups that exchange heads."""
    groups = [dist.new_group(ranks) for ranks in ((0, 1), (2, 3))]
    rings = [dist.new_group(ranks) for ranks in ((0, 2), (1, 3))]
    ours = {"group": groups[rank // 2], "ring_group": rings[rank % 2]}
    lengths = [5, 3, 4, 6]
    rows = own(lengths, rank)
    compare(rows, rows, (18, 18), {"causal": True, "window": (6, None)}, with_sinks=True, **ours)
    compare(rows, rows, (18, 18), {"value_head_map": VALUE_MAP}, bshd=True, **ours)
    # Each group holds both ends of the sequence; its first rank has the first 3 of its tokens.
    ranges = zigzag_ranges(20, 2)
    positions = torch.cat([torch.arange(b, e) for b, e in ranges[rank // 2]])
    rows = positions[:3] if rank % 2 == 0 else positions[3:]
    ours |= {"q_ranges": ranges, "kv_ranges": ranges}
    compare(rows, rows, (20, 20), {"causal": True, "softcap": 2.0}, **ours)


def test_three_ranks_equal_one(tmp_path):
    run_ranks(three_ranks, tmp_path, world=WORLD)


def test_inside_a_ring(tmp_path):
    run_ranks(four_ranks, tmp_path, world=4)


def test_heads_of_ranks_that_do_not_divide():
    shards = [HeadMap.uniform(28, 4).shard(rank, 8) for rank in range(8)]
    assert sorted(len(s.query_heads) for s in shards) == [3] * 4 + [4] * 4
    assert sum(len(s.kv_heads) for s in shards) < 28  # nothing is expanded
