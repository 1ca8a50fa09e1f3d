"""Plans (once per step, many layers), compilation, and the ops behind both."""

import sys

import pytest
import torch

from gqa_kernels import (
    DenseKVCache,
    HeadMap,
    PagedKVCache,
    asym_gqa_attention,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
    plan_decode,
)
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.backends.reference.cache import gather
from gqa_kernels.call.append import AppendCall
from gqa_kernels.decode import view_call
from gqa_kernels.testing import assert_decode_close
from tests.api.test_attention import widest
from tests.cache.test_append import stored
from tests.cache.test_decode import USABLE, filled, queries
from tests.cases.appends import rotary_table
from tests.cases.attention import UNEVEN, interpreted
from tests.cases.caches import Kind
from tests.conftest import DEVICE


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layers_of(cache, count):
    """Layers with memory of their own and one page table and lengths between them."""
    return [
        PagedKVCache(
            torch.randn_like(cache.k), torch.randn_like(cache.v), cache.page_table, cache.lengths
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("backend", USABLE)
def test_one_plan_serves_the_layers_of_a_step(backend, device):
    cache, _ = filled(Kind(4), widest(backend), device, lengths=(9, 3), room=True)
    layers = layers_of(cache, 2)
    plan = None
    for step in range(2):
        new = torch.randn(2, 2, 3, 1, 24, device=device).to(widest(backend))
        for layer in layers:
            q = queries(2, UNEVEN, 1, 16, widest(backend), device, seed=step)
            if plan is None:
                plan = plan_decode(q, layer, UNEVEN, window=(5, None), backend=backend)
            out = plan(q, layer, new[0, ..., :16].contiguous(), new[1])
            grown = layer.at(layer.page_table, layer.lengths + 1)
            assert_decode_close(out, q, grown, UNEVEN, window=(5, None))
        layer.advance(plan.new_tokens)  # in place: the plan sees it
        assert cache.lengths.tolist() == [10 + step, 4 + step]


@pytest.mark.parametrize("backend", USABLE)
def test_a_plan_reads_lengths_tables_and_maps_when_it_runs(backend, device):
    """As the replays of a CUDA graph do."""
    cache, _ = filled(Kind(4), widest(backend), device, lengths=(9, 14))
    q = queries(2, UNEVEN, 1, 16, widest(backend), device)
    plan = plan_decode(q, cache, UNEVEN, backend=backend)
    before = plan(q, cache)
    cache.lengths.copy_(cache.lengths.flip(0))
    cache.page_table.copy_(cache.page_table.flip(0))
    assert torch.equal(plan(q.flip(0), cache), before.flip(0))


class Blind(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises if the host reads a tensor's contents, which a CUDA-graph capture forbids."""

    LOOKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.__name__.split(".")[0] not in self.LOOKS, f"the host looks at a tensor: {op}"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [name for name in USABLE if name != "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_plan_looks_at_no_tensor(backend, packed, device, monkeypatch):
    """With tensors that can't be read for nothing, as on a device: append, rotary and attention."""
    for name, module in list(sys.modules.items()):
        if name.startswith("gqa_kernels") and hasattr(module, "is_readable"):
            monkeypatch.setattr(module, "is_readable", lambda x: False)
    dtype = widest(backend)
    cache, _ = filled(Kind(4), dtype, device, lengths=(9, 3), room=True)
    cos, sin = (x.to(device) for x in rotary_table(12))
    options, rows = {}, (2,)
    if packed:
        rows = (3,)
        options = {"cu_seqlens_q": torch.tensor([0, 1, 3], device=device), "max_seqlen_q": 2}
    q, k, v = (
        torch.randn(*rows, heads, *((1,) if not packed else ()), dim, device=device).to(dtype)
        for heads, dim in ((6, 16), (3, 16), (3, 24))
    )
    head_map = UNEVEN.tensor(device)
    plan = plan_decode(q, cache, head_map, backend=backend, **options)
    expected = plan(q, cache, k, v, rotary_cos=cos, rotary_sin=sin)
    with Blind():
        out = plan(q, cache, k, v, rotary_cos=cos, rotary_sin=sin)
        cache.advance(plan.new_tokens)
    assert torch.equal(out, expected)
    assert cache.lengths.tolist() == ([10, 5] if packed else [10, 4])


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", [name for name in USABLE if name != "reference"])
def test_a_captured_plan_follows_lengths_tables_and_maps(backend, device):
    dtype = widest(backend)
    cache, _ = filled(Kind(4), dtype, device, lengths=(9, 14), room=True)
    cache.k.normal_(), cache.v.normal_()
    head_map = UNEVEN.tensor(device).clone()
    q = queries(2, UNEVEN, 1, 16, dtype, device)
    k, v = (torch.randn(2, 3, 1, dim, device=device).to(dtype) for dim in (16, 24))
    plan = plan_decode(q, cache, head_map, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plan(q, cache, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan(q, cache, k, v)
    for lengths, entries in (([3, 30], [0, 0, 0, 1, 2, 2]), ([0, 17], [2, 1, 0, 0, 0, 0])):
        cache.lengths.copy_(torch.tensor(lengths))
        cache.page_table.copy_(cache.page_table.flip(0))
        head_map.copy_(torch.tensor(entries))
        graph.replay()
        torch.cuda.synchronize()
        grown = cache.at(cache.page_table, cache.lengths + 1)
        assert_decode_close(out, q, grown, HeadMap(entries, 3))
        new = gather(grown.view())[0][torch.arange(2), :, torch.tensor(lengths)]
        assert torch.equal(new, k[:, :, 0])


@pytest.mark.parametrize("backend", USABLE)
def test_decode_appends_and_attends(backend, device):
    """Rotary, a packed step, the cache advanced once; against the two calls by themselves."""
    kind = Kind(4, format="int8")
    cos, sin = (x.to(device) for x in rotary_table(12))
    results = []
    for fused in (True, False):
        cache, _ = filled(kind, widest(backend), device, lengths=(9, 0, 3), room=True)
        generator = torch.Generator().manual_seed(8)
        q, k, v = (
            torch.randn(7, heads, dim, generator=generator).to(device, widest(backend))
            for heads, dim in ((6, 16), (3, 16), (3, 24))
        )
        offsets = torch.tensor([0, 4, 7, 7], device=device)
        packing = {"cu_seqlens_q": offsets, "max_seqlen_q": 4}
        rotary = {"rotary_cos": cos, "rotary_sin": sin}
        if fused:
            out = asym_gqa_decode(q, cache, UNEVEN, k_new=k, v_new=v, **packing, **rotary,
                                  backend=backend)  # fmt: skip
        else:
            q = cache.append(k, v, q=q, cu_seqlens=offsets, max_seqlen=4, **rotary,
                             backend=backend)  # fmt: skip
            out = asym_gqa_decode(q, cache, UNEVEN, **packing, backend=backend)
            assert_decode_close(out, q, cache, UNEVEN, **packing)
        assert cache.lengths.tolist() == [13, 3, 3]
        results.append((out, *stored(cache)))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


COMPILED = [Kind(4, format="int4", zeros=True), Kind(4), Kind()]


@pytest.mark.parametrize(
    "kind, backend",
    [  # every kind on the CPU kernels, the first one on all backends
        pytest.param(
            kind,
            name,
            marks=pytest.mark.slow if i and (name == "reference" or interpreted(name)) else (),
        )
        for name in USABLE
        for i, kind in enumerate(COMPILED)
    ],
    ids=str,
)
def test_compiled_decode(backend, kind, device):
    """One graph, which appends, advances and attends, and sees lengths change."""
    dtype = widest(backend)
    eager, _ = filled(kind, dtype, device, lengths=(9, 3), room=True)
    cache, _ = filled(kind, dtype, device, lengths=(9, 3), room=True)

    def step(cache, q, k, v):
        return asym_gqa_decode(q, cache, UNEVEN, k_new=k, v_new=v, backend=backend) + 0.0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        q = queries(2, UNEVEN, 1, 16, dtype, device, seed)
        k, v = (torch.randn(2, 3, 1, dim, device=device).to(dtype) for dim in (16, 24))
        torch.testing.assert_close(compiled(cache, q, k, v), step(eager, q, k, v))
        assert torch.equal(cache.lengths, eager.lengths)
        for x, y in zip(stored(cache), stored(eager), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("backend", USABLE)
def test_compiled_varlen(backend, device):
    q, k = (
        torch.randn(*shape, 16, device=device).to(widest(backend)) for shape in ((9, 6), (12, 3))
    )
    cu_q = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)

    def call(q, k, cu_q, cu_k):
        return asym_gqa_varlen_attention(q, k, k, UNEVEN, cu_q, cu_k, 5, 7, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, cu_q, cu_k), call(q, k, cu_q, cu_k))


def op_of(backend):
    """A backend's attention op and append op, caught on their way."""
    if backend in ("cpu", "cuda"):
        ops = torch.ops.gqa_kernels
        return ops.attention_forward.default, ops.cache_append.default
    from gqa_kernels.backends.triton.ops import triton_attention_forward, triton_cache_append

    return triton_attention_forward._opoverload, triton_cache_append._opoverload


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of the calls of some ops."""

    def __init__(self, ops):
        super().__init__()
        self.ops, self.calls = ops, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in self.ops:
            self.calls.append((op, args, kwargs or {}))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [name for name in USABLE if name != "reference"])
@pytest.mark.parametrize("kind", [Kind(), Kind(4, format="int4", zeros=True)], ids=str)
def test_opcheck(backend, kind, device):
    dtype = widest(backend)
    cache, _ = filled(kind, dtype, device, lengths=(9, 3), room=True)
    q = queries(1, UNEVEN, 5, 16, dtype, device)[0].transpose(0, 1).contiguous()
    offsets = torch.tensor([0, 2, 5], device=device)
    cos, sin = (x.to(device) for x in rotary_table(12))
    new = torch.randn(5, 3, 24, device=device).to(dtype)
    view = cache.view()
    append = AppendCall.create(
        new[..., :16].contiguous(), new, view, q=q, cu_seqlens=offsets, max_seqlen=3,
        rotary_cos=cos, rotary_sin=sin,
    )  # fmt: skip
    attend = view_call(q, view, UNEVEN, cu_seqlens_q=offsets, max_seqlen_q=3)
    with Recorded(op_of(backend)) as recorded:
        BACKENDS[backend].append(append)
        BACKENDS[backend].attend(attend)
    assert len(recorded.calls) == 2
    for op, args, kwargs in recorded.calls:
        torch.library.opcheck(op, args, kwargs)


def test_a_cache_of_ones_own_layout(device):
    """The memory of vLLM's flash layout and FlashInfer's CSR tables give the same."""
    cache, _ = filled(Kind(16, "packed"), torch.float32, device)
    q = queries(3, UNEVEN, 1, 16, torch.float32, device)
    expected = asym_gqa_decode(q, cache, UNEVEN)
    both = torch.stack([cache.k, cache.v]).transpose(2, 3)  # [2, P, page, H, D]
    table = cache.page_table.clamp(0, both.shape[1] - 1)
    other = PagedKVCache.from_packed(both, table, cache.lengths, axis=0, order="NHD")
    assert torch.equal(asym_gqa_decode(q, other, UNEVEN), expected)
    count = (cache.lengths + 15) // 16
    indptr = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    used = torch.arange(table.shape[1], device=device) < count[:, None]
    last = cache.lengths - (count - 1) * 16
    other = PagedKVCache.from_csr(
        both[0], both[1], indptr, table[used], last.clamp(max=16), order="NHD"
    )
    assert other.lengths.tolist() == cache.lengths.tolist()
    assert torch.equal(asym_gqa_decode(q, other, UNEVEN), expected)
    plain = DenseKVCache(
        *(x.transpose(1, 2).contiguous() for x in (cache.k[:3], cache.v[:3])),
        torch.tensor([16, 2, 5], device=device), layout="bshd",
    )  # fmt: skip
    plain.k.nan_to_num_(0), plain.v.nan_to_num_(0)
    dense = asym_gqa_attention(
        q, plain.k, plain.v, UNEVEN, kv_lengths=plain.lengths, backend="reference"
    )
    torch.testing.assert_close(asym_gqa_decode(q, plain, UNEVEN, backend="reference"), dense)
