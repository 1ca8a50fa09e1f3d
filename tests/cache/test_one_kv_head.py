"""One key head: its lengths and page-table rows can't differ between heads, whatever their strides.

The stride of a dim of size 1 is arbitrary, so it must not decide what a call is.
"""

import pytest
import torch

from gqa_kernels import DenseKVCache, PagedKVCache, asym_gqa_decode
from tests.api.test_attention import widest
from tests.cache.test_decode import USABLE
from tests.cases.appends import rotary_table

VALUE_MAP = [0, 1, 2, 1]


def caches(kind, batch, value_heads, dtype, device):
    """An empty cache of one key head and capacity 16."""
    shape = dict(num_value_heads=value_heads, dtype=dtype, device=device)
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    if kind == "pages":
        table = torch.arange(4 * batch, device=device).view(batch, 4)
        return PagedKVCache.empty(4 * batch, 4, 1, 16, **shape).at(table, lengths)
    cache = DenseKVCache.empty(batch, 1, 16, 16, **shape)
    if kind == "dense":
        return cache
    if kind == "lengths per head":
        return DenseKVCache(cache.k, cache.v, lengths[:, None])
    index = torch.arange(batch, device=device).flip(0)
    return DenseKVCache(cache.k, cache.v, lengths, batch_index=index)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("kind", ["dense", "batch index", "pages", "lengths per head"])
@pytest.mark.parametrize("batch, value_heads", [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("rotary", [False, True])
def test_appends_and_attends(kind, batch, value_heads, rotary, backend, device):
    dtype = widest(backend)
    cache = caches(kind, batch, value_heads, dtype, device)
    options = {}
    if rotary:
        cos, sin = (x.to(device) for x in rotary_table(16, 16))
        options = {"rotary_cos": cos, "rotary_sin": sin}
    if value_heads > 1:
        options["value_head_map"] = VALUE_MAP
    q, k, v = (torch.randn(batch, h, 3, 16).to(device, dtype) for h in (4, 1, value_heads))
    out = asym_gqa_decode(q, cache, [0] * 4, k_new=k, v_new=v, backend=backend, **options)
    assert cache.lengths.flatten().tolist() == [3] * batch
    read = v[:, VALUE_MAP] if value_heads > 1 else v.expand(-1, 4, -1, -1)
    torch.testing.assert_close(out[:, :, 0], read[:, :, 0])  # the first query sees one key
    again = asym_gqa_decode(q[:, :, 2:], cache, [0] * 4, backend="reference", **{
        name: x for name, x in options.items() if name == "value_head_map"
    })  # fmt: skip
    if not rotary:
        torch.testing.assert_close(out[:, :, 2:], again, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("kind", ["number", "per head"])
def test_given_scales_stay_where_a_page_is_one_token(kind, backend, device):
    """The scale of the whole tensor is no scale of each token, however its strides look."""
    pages = torch.zeros(4, 1, 1, 16, dtype=torch.int8, device=device)
    scale = torch.tensor([0.5], device=device)
    given = 0.5 if kind == "number" else scale
    table = torch.arange(4, device=device)[None]
    lengths = torch.zeros(1, dtype=torch.int32, device=device)
    cache = PagedKVCache(pages, pages.clone(), table, lengths, k_scale=given, v_scale=given)
    new = torch.full((1, 1, 1, 16), 3.0, device=device)
    cache.append(new, new, backend=backend)
    assert (cache.k[0] == 6).all() and scale.item() == 0.5
