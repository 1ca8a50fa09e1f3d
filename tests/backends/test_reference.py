"""Gradients of the reference, which every fused backward will be held to."""

import pytest
import torch

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.testing import make_inputs

MAP = HeadMap([0, 2, 0], num_kv_heads=3)  # KV head 1 is read by nobody

OPTIONS = {
    "plain": {},
    "causal-more-queries-than-keys": {"causal": True},
    "window-softcap": {"window": (1, 1), "softcap": 2.0},
    "value-map": {"value_head_map": HeadMap([1, 2, 0])},
    "mask": {"attn_mask": torch.tensor([0.5, -torch.inf, 0.1], dtype=torch.float64)},
    "lengths": {"kv_lengths": [0, 2]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    q, k, v = make_inputs(2, MAP, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    slopes = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64, requires_grad=True)
    sinks = torch.tensor([0.3, -1.0, 0.2], dtype=torch.float64, requires_grad=True)

    def call(q, k, v, slopes, sinks):
        out, lse = asym_gqa_attention(
            q, k, v, MAP, alibi_slopes=slopes, sinks=sinks, return_lse=True, **options
        )
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(call, (q, k, v, slopes, sinks))


def test_gradients_of_unread_heads_unseen_rows_and_unused_slots_are_zero():
    q, k, v = make_inputs(2, MAP, 4, 3, 2)
    k[:, :, 2:], v[:, :, 2:] = torch.nan, torch.inf  # beyond both lengths
    for x in (q, k, v):
        x.requires_grad_()
    out = asym_gqa_attention(q, k, v, MAP, causal=True, kv_lengths=[2, 0])
    out.square().sum().backward()
    for x in (k, v):
        assert x.grad.isfinite().all()
        assert (x.grad[:, 1] == 0).all() and (x.grad[:, :, 2:] == 0).all()
        assert (x.grad[1] == 0).all() and (x.grad[0, 0, :2] != 0).any()
    assert (q.grad[0, :, :2] == 0).all()  # queries 0 and 1 come before the first key
    assert (q.grad[1] == 0).all() and q.grad.isfinite().all()
