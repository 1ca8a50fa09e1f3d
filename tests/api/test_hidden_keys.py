"""NaN and infinities at keys that a mask, causality or a window hides: what the docstring of
asym_gqa_attention says, for dense tensors, caches and packed sequences."""

import math

import pytest
import torch

from gqa_kernels import (
    DenseKVCache,
    HeadMap,
    asym_gqa_attention,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
)
from gqa_kernels.testing import make_inputs
from tests.api.test_attention import USABLE, widest

MAP = HeadMap([0, 1, 0])
HIDERS = ("bool", "additive", "lowest", "causal", "window")
SHAPES = {"decode": (1, 70), "few queries": (4, 70), "prefill": (40, 70)}


def dense(q, k, v, options):
    return asym_gqa_attention(q, k, v, MAP, return_lse=True, **options)


def cached(q, k, v, options):
    lengths = torch.tensor([k.shape[2]], dtype=torch.int32, device=k.device)
    options = {"causal": False, **options}
    return asym_gqa_decode(q, DenseKVCache(k, v, lengths), MAP, return_lse=True, **options)


def packed(q, k, v, options):
    offsets = [torch.tensor([0, x.shape[2]], device=q.device) for x in (q, k)]
    tokens = [x[0].transpose(0, 1) for x in (q, k, v)]
    out, lse = asym_gqa_varlen_attention(
        *tokens, MAP, *offsets, q.shape[2], k.shape[2], return_lse=True, **options
    )
    return out.transpose(0, 1)[None], lse[None]


def hide(by, q_len, kv_len, device):
    """Options, a key that they hide, and from whom: some of the queries."""
    if by == "causal":
        return {"causal": True}, kv_len - 1, slice(0, q_len - 1)
    if by == "window":
        return {"window": (kv_len - q_len - 1, None)}, 0, slice(0 if q_len == 1 else 1, q_len)
    mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    mask[:, kv_len // 2] = False
    if by != "bool":
        lowest = -math.inf if by == "additive" else torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, lowest)
    return {"attn_mask": mask}, kv_len // 2, slice(0, q_len)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("memory", [dense, cached, packed])
@pytest.mark.parametrize("by", HIDERS)
@pytest.mark.parametrize("q_len, kv_len", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_values_at_a_hidden_key(backend, memory, by, q_len, kv_len, value, device):
    if (memory is packed and by in HIDERS[:3]) or (by == "causal" and q_len == 1):
        pytest.skip("nothing is hidden")
    options, key, queries = hide(by, q_len, kv_len, device)
    options["backend"] = backend
    q, k, v = make_inputs(1, MAP, q_len, kv_len, 16, dtype=widest(backend), device=device)
    out, lse = (x[:, :, queries] for x in memory(q, k, v, options))
    assert out.isfinite().all() and lse.isfinite().all()

    spoiled = k.clone()
    spoiled[:, :, key] = value
    found = [x[:, :, queries] for x in memory(q, spoiled, v, options)]
    assert torch.equal(found[0], out) and torch.equal(found[1], lse)

    spoiled = v.clone()
    spoiled[:, 0, key] = value
    found = [x[:, :, queries] for x in memory(q, k, spoiled, options)]
    assert torch.equal(found[1], lse)
    readers = [h for h, kv in enumerate(MAP) if kv == 0]
    assert torch.equal(found[0][:, 1], out[:, 1])  # reads another head
    is_nan = found[0][:, readers].isnan()
    assert torch.equal(is_nan.all(-1), is_nan.any(-1))
    assert torch.equal(found[0][:, readers].where(~is_nan, 0), out[:, readers].where(~is_nan, 0))
    if by in HIDERS[:3] or backend == "reference":  # nothing is skipped
        assert is_nan.all()
