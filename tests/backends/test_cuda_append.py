"""The append on a GPU: what is particular to the CUDA kernel. tests/cache has what all share."""

from dataclasses import replace

import pytest
import torch

from gqa_kernels.backends.cuda import CUDABackend
from gqa_kernels.backends.dispatch import explain
from gqa_kernels.backends.reference.cache import reference_append
from tests.cases.appends import CASES, ROTARY, appends, assert_same_memory, bits
from tests.cases.caches import Kind

REASON = CUDABackend().unavailable_reason()
needs_gpu = pytest.mark.skipif(REASON is not None, reason=f"backend cuda: {REASON}")


def test_every_kind_is_declared():
    """If a machine has no GPU, that is the only reason given against each of them."""
    for options in CASES.values():
        reasons = CUDABackend().unsupported(appends(**options))
        assert reasons == ["device cpu (supported: cuda)"]


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_stores_what_the_definition_says(name):
    """Bit for bit the reference's memory, on the CPU."""
    expected, got = (appends(**CASES[name], device=device) for device in ("cpu", "cuda"))
    assert explain(got)["cuda"] == []
    CUDABackend().prepare()
    rotated, q = CUDABackend().append(got), reference_append(expected)
    assert_same_memory(got.view, expected.kv)
    if q is not None:
        assert torch.equal(bits(rotated.cpu()), bits(q))


@needs_gpu
def test_append_of_many_tokens():
    """A prompt's worth: many CTAs, and offsets beyond 32 bits in the cache."""
    from gqa_kernels import DenseKVCache

    try:
        room = torch.empty(2, 1, 1 << 24, 128, dtype=torch.bfloat16, device="cuda")
    except torch.cuda.OutOfMemoryError:
        pytest.skip("8 GiB of device memory are not free")
    start, tokens = (1 << 24) - 5000, 5000
    cache = DenseKVCache(room, room, torch.tensor([start, 7], dtype=torch.int32, device="cuda"))
    new = torch.randn(2, 1, tokens, 128, device="cuda").to(torch.bfloat16)
    cache.append(new, new, backend="cuda")
    assert torch.equal(room[0, :, start:], new[0])
    assert torch.equal(room[1, :, 7 : 7 + tokens], new[1])


@needs_gpu
def test_a_captured_append_reads_the_current_lengths_and_tables():
    """No synchronisation either: capture forbids it."""
    options = {**ROTARY["half-split"], "kind": Kind(3)}
    inputs = appends(**options, device="cuda")
    table = inputs.kv.page_table[:, 0].clone()  # whose contents change between replays
    lengths = inputs.kv.kv_lengths[:, 0].clone()
    view = replace(
        inputs.kv,
        page_table=table[:, None].expand_as(inputs.kv.page_table),
        kv_lengths=lengths[:, None].expand_as(inputs.kv.kv_lengths),
    )
    inputs = replace(inputs, kv=view)
    CUDABackend().prepare()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        CUDABackend().append(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotated = CUDABackend().append(inputs)
    for new_lengths in ([0, 5, 2], [9, 1, 11]):
        poisoned = appends(**options)
        inputs.kv.k.copy_(poisoned.kv.k), inputs.kv.v.copy_(poisoned.kv.v)
        lengths.copy_(torch.tensor(new_lengths))
        table.copy_(table.flip(0))
        graph.replay()
        torch.cuda.synchronize()
        place = {"kv_lengths": view.kv_lengths.cpu(), "page_table": view.page_table.cpu()}
        expected = replace(poisoned, kv=replace(poisoned.kv, **place))
        assert torch.equal(bits(rotated.cpu()), bits(reference_append(expected)))
        assert_same_memory(inputs.kv, expected.kv)


@needs_gpu
def test_errors_name_the_rule_and_the_value():
    CUDABackend().prepare()
    inputs = appends(**ROTARY["half-split"], device="cuda")
    for changes, message in [
        ({"rotary_cos": inputs.rotary_cos.cpu()}, "rotary_cos must be on cuda:0 as q is"),
        ({"v_new": inputs.v_new.half()}, "v_new must have dtype BFloat16, got Half"),
        ({"rotary_sin": inputs.rotary_sin[:3]}, r"rotary_sin must have shape \(50, 32\)"),
        ({"v_new": inputs.v_new[:, :, :2]}, r"v_new must have shape \(1, 3, 9, 64\)"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            CUDABackend().append(replace(inputs, **changes))
