"""DTensors through the attention ops on two ranks: results, gradients and what is communicated."""

import importlib
import sys
from itertools import product

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.parallel import dtensor
from tests.parallel.ranks import WORLD, run_ranks

HEAD_MAP = HeadMap([0, 2, 0, 1, 0])  # 5 query heads, 3 on the first rank, over 3 KV heads
BATCH = 3
WHOLE = Replicate()

# Placements of q and of k and v, options, and whether the ranks can work alone.
CASES = {
    "batch": (Shard(0), Shard(0), {"causal": True, "kv_lengths": torch.tensor([4, 7, 5])}, True),
    "batch, every bias": (
        Shard(0), Shard(0), {"alibi_slopes": (5,), "sinks": (5,), "attn_mask": (BATCH, 1, 6, 7)},
        True,
    ),
    "heads": (Shard(1), WHOLE, {"causal": True, "softcap": 2.0, "sinks": (5,)}, True),
    "heads, every bias": (
        Shard(1), WHOLE, {"alibi_slopes": (5,), "value_head_map": HeadMap([2, 1, 0, 0, 2])}, True,
    ),
    "tokens": (Shard(2), WHOLE, {"sinks": (5,), "attn_mask": (6, 7)}, True),
    "causal tokens": (Shard(2), WHOLE, {"causal": True}, False),
    "heads of K and V": (Shard(1), Shard(1), {"causal": True}, False),
    "whole": (WHOLE, WHOLE, {"window": (2, 1)}, True),
}  # fmt: skip


def drawn(options):
    """Options with random tensors where they say shapes."""
    return {
        name: torch.randn(x) if isinstance(x, tuple) and name != "window" else x
        for name, x in options.items()
    }


def ranks(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    registered = dtensor.register()
    assert dtensor.register() == registered and registered
    for backend, (name, case) in product(registered, CASES.items()):
        if backend == "cuda" or (backend == "triton" and name != "batch"):  # slow interpreted
            continue
        q_placement, kv_placement, options, alone = case
        torch.manual_seed(0)
        tensors = [torch.randn(BATCH, h, n, 16) for h, n in ((5, 6), (3, 7), (3, 7))]
        options = drawn(options)
        placements = (q_placement, kv_placement, kv_placement)
        ours = [
            distribute_tensor(x, mesh, [p]).requires_grad_()
            for x, p in zip(tensors, placements, strict=True)
        ]
        theirs = [x.clone().requires_grad_() for x in tensors]
        with implicit_replication(), CommDebugMode() as communication:
            out = asym_gqa_attention(*ours, HEAD_MAP, backend=backend, **options)
            forward = communication.get_total_counts()
            whole_out = out.full_tensor()
            out.backward(distribute_tensor(torch.ones_like(whole_out), mesh, out.placements))
        expected = asym_gqa_attention(*theirs, HEAD_MAP, **options)
        expected.sum().backward()
        where = f"{backend}, {name}, rank {rank}: "
        torch.testing.assert_close(whole_out, expected, msg=lambda m, w=where: w + m)
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x.grad.full_tensor(), y.grad, msg=lambda m, w=where: w + m)
        assert (forward == 0) == alone, where
    q, k, v = (distribute_tensor(x, mesh, [WHOLE]) for x in tensors)
    with implicit_replication(), pytest.raises(NotImplementedError, match="must be 0 for DTensors"):
        asym_gqa_attention(q, k, v, HEAD_MAP, dropout_p=0.5)


def test_torch_without_dtensor(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor.experimental", None)
    monkeypatch.delitem(sys.modules, dtensor.__name__)
    with pytest.raises(ImportError, match=r"needs torch >= 2\.10, built with torch\.distributed"):
        importlib.import_module(dtensor.__name__)


def test_the_plan_of_triton_is_not_cut():
    q = torch.zeros(1)
    others = dtensor.FORWARD.Arguments(q, q, q, q, window_right=0)
    assert dtensor.WAYS["heads"] in dtensor._ways(True, others)
    assert dtensor._ways(False, others) == [dtensor.WAYS["whole"], dtensor.WAYS["batch"]]


def test_two_ranks_equal_one(tmp_path):
    run_ranks(ranks, tmp_path)
