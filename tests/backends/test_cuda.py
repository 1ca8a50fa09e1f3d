"""What is particular to the CUDA kernels; the cases that all backends share are elsewhere."""

import shutil
import subprocess
from itertools import product

import pytest
import torch

from gqa_kernels import (
    HeadMap,
    asym_gqa_attention,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
)
from gqa_kernels.attention import attention_call
from gqa_kernels.backends.cuda import CUDABackend
from gqa_kernels.backends.triton.splits import choose_splits
from gqa_kernels.cache.formats import FORMAT_OF_NAME
from gqa_kernels.native import sources
from gqa_kernels.testing import (
    assert_attention_close,
    assert_decode_close,
    assert_gradients_close,
    make_inputs,
)
from tests.api.test_gradients import check as check_gradients
from tests.cases.attention import LARGE_GROUP, UNEVEN
from tests.cases.caches import Kind, empty_cache, fill, hide_unused_pages

REASON = CUDABackend().unavailable_reason()
needs_gpu = pytest.mark.skipif(REASON is not None, reason=f"backend cuda: {REASON}")
DTYPES = sorted(CUDABackend.capabilities.dtypes, key=str)


def test_what_the_backend_declares():
    q, k, v = make_inputs(1, UNEVEN, 1, 3, 16)
    reasons = CUDABackend().unsupported(attention_call(q, k, v, UNEVEN))
    assert reasons == ["device cpu (supported: cuda)", "dtype float32 (bfloat16, float16 only)"]


def test_both_halves_choose_the_same_splits(tmp_path):
    """csrc/core/splits.h against gqa_kernels/splits.py."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    header = sources.source_root() / "core" / "splits.h"
    cases = list(
        product([0, 1, 3, 8, 64, 200, 316, 317, 1000], [0, 1, 2, 5, 63, 64, 2048], [24, 396])
    )
    calls = "\n".join(f'std::printf("%d\\n", int(gqa::choose_splits({a}, {b}, {c})));'
                      for a, b, c in cases)  # fmt: skip
    source = tmp_path / "splits.cpp"
    source.write_text(f'#include "{header}"\n#include <cstdio>\nint main() {{\n{calls}\n}}\n')
    subprocess.run([compiler, "-std=c++17", source, "-o", tmp_path / "splits"], check=True)
    told = subprocess.run([tmp_path / "splits"], capture_output=True, text=True, check=True)
    assert [int(x) for x in told.stdout.split()] == [choose_splits(*c).num_splits for c in cases]


def test_division_by_page_sizes_is_exact(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    header = sources.source_root() / "cuda" / "common" / "page_divider.h"
    source = tmp_path / "divider.cpp"
    source.write_text(
        f"""#include "{header}"
        #include <algorithm>
        #include <cstdio>
        int main() {{
          int wrong = 0;
          const auto check = [&](uint32_t size) {{
            const gqa::cuda::PageDivider divider = gqa::cuda::page_divider(size);
            const auto same = [&](uint32_t n) {{ wrong += divider.quotient(n) != n / size; }};
            for (uint32_t n = 0; n < 3000; ++n) same(n), same(INT32_MAX - n);
            const uint64_t step = 1 + std::max<uint64_t>(INT32_MAX / size / 500 * size, 1 << 21);
            for (uint64_t n = size; n <= INT32_MAX; n += step) {{
              same(static_cast<uint32_t>(n)), same(static_cast<uint32_t>(n) - 1);
            }}
          }};
          for (uint32_t size = 1; size < 2000; ++size) check(size);
          for (uint32_t bit = 11; bit < 31; ++bit) {{
            check((1u << bit) - 1), check(1u << bit), check((1u << bit) + 1);
          }}
          check(INT32_MAX - 1), check(INT32_MAX);
          std::printf("%d", wrong);
        }}"""
    )
    subprocess.run([compiler, "-std=c++17", "-O1", source, "-o", tmp_path / "divider"], check=True)
    told = subprocess.run([tmp_path / "divider"], capture_output=True, text=True, check=True)
    assert told.stdout == "0"


def check(q, k, v, head_map, **options):
    out, lse = asym_gqa_attention(q, k, v, head_map, return_lse=True, backend="cuda", **options)
    assert_attention_close(out, q, k, v, head_map, lse=lse, **options)
    return out


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [1, 3, 16, 17, 128, 300])
@pytest.mark.parametrize("dim, value_dim", [(64, 64), (128, 128), (256, 256), (80, 40), (33, 7)])
def test_every_phase_and_head_dim_class(dtype, q_len, dim, value_dim):
    q, k, v = make_inputs(
        2, UNEVEN, q_len, 1000, dim, value_head_dim=value_dim, dtype=dtype, device="cuda"
    )
    check(q, k, v, UNEVEN, causal=True)
    check(q, k, v, UNEVEN, kv_lengths=torch.tensor([[1000, 3, 0], [999, 64, 500]], device="cuda"))


@needs_gpu
@pytest.mark.parametrize("format", FORMAT_OF_NAME)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, value_dim", [(64, 64), (128, 128), (256, 256), (80, 40), (34, 6)])
def test_quantised_caches_in_every_phase_and_head_dim_class(format, dtype, dim, value_dim):
    generator = torch.Generator().manual_seed(0)
    kind = Kind(16, format=format, zeros=format.startswith("int"))
    cache = empty_cache(kind, 3, 1000, UNEVEN, dim, value_dim, dtype, "cuda", generator)
    fill(cache, [1000, 3, 64], generator, dtype=dtype)
    hide_unused_pages(cache)
    for q_len in (1, 16, 300):
        q = torch.randn(3, UNEVEN.num_heads, q_len, dim, generator=generator).to("cuda", dtype)
        out, lse = asym_gqa_decode(q, cache, UNEVEN, return_lse=True, backend="cuda")
        assert_decode_close(out, q, cache, UNEVEN, lse=lse)


@needs_gpu
@pytest.mark.parametrize("batch, kv_len", [(1, 70_000), (3, 4097), (300, 130)])
def test_any_number_of_splits(batch, kv_len):
    q, k, v = make_inputs(batch, UNEVEN, 2, kv_len, 64, dtype=torch.bfloat16, device="cuda")
    check(q, k, v, UNEVEN, causal=True, sinks=torch.linspace(-1, 2, 6, device="cuda"))


@needs_gpu
@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_group_larger_than_a_tile(q_len):
    q, k, v = make_inputs(2, LARGE_GROUP, q_len, 300, 64, dtype=torch.float16, device="cuda")
    check(q, k, v, LARGE_GROUP, causal=True)


@needs_gpu
def test_offsets_beyond_32_bits():
    """Keys whose elements lie more than 2^31 apart."""
    head_map = HeadMap([0, 1])
    try:
        room = torch.empty(2, 2, (1 << 30) // 64 + 100, 64, dtype=torch.bfloat16, device="cuda")
    except torch.cuda.OutOfMemoryError:
        pytest.skip("8 GiB of device memory are not free")
    room[:, :, -100:] = torch.randn(2, 2, 100, 64, device="cuda").to(torch.bfloat16)
    k = room[:, :, -100:]
    for q_len in (1, 40):
        q = torch.randn(2, 2, q_len, 64, device="cuda").to(torch.bfloat16)
        check(q, k, k, head_map, causal=True)


@needs_gpu
@pytest.mark.parametrize("q_len", [1, 200])
def test_device_map_is_read_on_the_device(q_len):
    """No synchronisation, and NaN for heads whose entry is out of range."""
    q, k, v = make_inputs(2, UNEVEN, q_len, 300, 64, dtype=torch.bfloat16, device="cuda")
    head_map = torch.tensor([0, 3, 1, -1, 2, 2], device="cuda", dtype=torch.int32)
    asym_gqa_attention(q, k, v, head_map, causal=True, backend="cuda")  # builds, allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = asym_gqa_attention(q, k, v, head_map, causal=True, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    good = [0, 2, 4, 5]
    assert out[:, [1, 3]].isnan().all()
    assert_attention_close(out[:, good], q[:, good], k, v, [0, 1, 2, 2], causal=True)


@needs_gpu
@pytest.mark.parametrize("q_len", [1, 200])
def test_a_captured_graph_reads_the_current_map_and_lengths(q_len):
    q, k, v = make_inputs(2, UNEVEN, q_len, 700, 64, dtype=torch.bfloat16, device="cuda")
    head_map = UNEVEN.tensor("cuda").clone()
    lengths = torch.full((2, 3), 700, dtype=torch.int32, device="cuda")

    def call():
        return asym_gqa_attention(
            q, k, v, head_map, causal=True, kv_lengths=lengths, backend="cuda"
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for entries, length in [([0, 0, 0, 1, 2, 2], 700), ([2, 1, 0, 0, 0, 0], 301)]:
        head_map.copy_(torch.tensor(entries))
        lengths.fill_(length)
        graph.replay()
        torch.cuda.synchronize()
        assert_attention_close(out, q, k, v, HeadMap(entries, 3), causal=True, kv_lengths=lengths)


@needs_gpu
@pytest.mark.parametrize("q_len", [1, 100])
def test_other_streams(q_len):
    """The work goes to torch's current stream, and its workspace lives as long as it."""
    q, k, v = make_inputs(1, UNEVEN, q_len, 5000, 128, dtype=torch.bfloat16, device="cuda")
    expected = asym_gqa_attention(q, k, v, UNEVEN, backend="cuda")
    torch.cuda.synchronize()
    outs = []
    for _ in range(4):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            outs.append(asym_gqa_attention(q, k, v, UNEVEN, backend="cuda"))
            torch.empty(1 << 24, device="cuda").fill_(torch.nan)
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


@needs_gpu
@pytest.mark.parametrize("q_len", [1, 33])
def test_opcheck(q_len):
    CUDABackend().prepare()
    q, k, v = make_inputs(2, UNEVEN, q_len, 90, 64, dtype=torch.bfloat16, device="cuda")
    args = (q, k, v, UNEVEN.tensor("cuda"), 0.125, -1, 0)
    torch.library.opcheck(torch.ops.gqa_kernels.attention_forward.default, args)


@needs_gpu
@pytest.mark.parametrize("page_size", [1, 16, 100])
@pytest.mark.parametrize("q_len", [1, 70])
def test_pages_agree_with_the_dense_cache(page_size, q_len):
    CUDABackend().prepare()
    lengths = torch.tensor([[300, 7, 64], [299, 300, 0]], dtype=torch.int32, device="cuda")
    q, k, v = make_inputs(2, UNEVEN, q_len, 300, 64, dtype=torch.bfloat16, device="cuda")
    pages = -(-300 // page_size)
    order = torch.randperm(2 * pages, device="cuda").to(torch.int32)
    table = order.view(2, 1, pages).expand(2, 3, pages)

    def stored(x):
        room = x.new_full((2, 3, pages * page_size, 64), torch.nan)
        room[:, :, :300] = x
        room = room.view(2, 3, pages, page_size, 64).transpose(1, 2).reshape(-1, 3, page_size, 64)
        return torch.empty_like(room).index_copy_(0, order.long(), room)

    out, lse = torch.ops.gqa_kernels.attention_forward.default(
        q,
        stored(k),
        stored(v),
        UNEVEN.tensor("cuda"),
        window_right=0,
        kv_lengths=lengths,
        page_table=table,
    )
    assert_attention_close(out, q, k, v, UNEVEN, lse=lse, causal=True, kv_lengths=lengths)


@needs_gpu
def test_errors_name_the_rule_and_the_value():
    CUDABackend().prepare()
    q, k, v = make_inputs(1, UNEVEN, 2, 5, 64, dtype=torch.bfloat16, device="cuda")
    head_map = UNEVEN.tensor("cuda")

    def call(q=q, k=k, v=v, head_map=head_map, kv_lengths=None):
        torch.ops.gqa_kernels.attention_forward.default(q, k, v, head_map, kv_lengths=kv_lengths)

    for arguments, message in [
        ({"k": k.half()}, "k must have q's dtype"),
        ({"head_map": head_map.cpu()}, "head_map must be on cuda:0 as q is"),
        ({"k": k.transpose(2, 3)}, "k must have a last dim of stride 1"),
        ({"v": v[:, :, :4]}, r"v must have shape \(1, 3, 5, 64\), got \(1, 3, 4, 64\)"),
        ({"head_map": head_map[:5]}, r"head_map must have shape \(6\), got \(5\)"),
        ({"q": q.float(), "k": k.float(), "v": v.float()}, "dtype must be bfloat16 or float16"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, value_dim", [(64, 64), (128, 128), (256, 256), (80, 40), (33, 7)])
@pytest.mark.parametrize("value_map", [None, HeadMap([0, 1, 1, 0, 0, 1])])
def test_gradients_of_every_head_dim_class(dtype, dim, value_dim, value_map):
    """Many blocks of tokens and of keys, both ends ragged."""
    q, k, v = make_inputs(
        2, UNEVEN, 300, 500, dim, value_head_dim=value_dim, value_head_map=value_map, dtype=dtype,
        device="cuda",
    )  # fmt: skip
    options = {} if value_map is None else {"value_head_map": value_map}
    check_gradients((q, k, v, UNEVEN), {"causal": True, **options}, "cuda")
    slopes = torch.rand(6, device="cuda")
    check_gradients(
        (q, k, v, UNEVEN), {"window": (70, 9), "alibi_slopes": slopes, **options}, "cuda"
    )


@needs_gpu
def test_backward_reads_the_map_on_the_device():
    """No synchronisation, and NaN in dQ only of heads whose entry is out of range."""
    q, k, v = make_inputs(2, UNEVEN, 200, 300, 64, dtype=torch.bfloat16, device="cuda")
    head_map = torch.tensor([0, 3, 1, -1, 2, 2], device="cuda", dtype=torch.int32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)

    def gradients():
        out = asym_gqa_attention(*leaves, head_map, causal=True, backend="cuda")
        return torch.autograd.grad(out, leaves, dout)

    gradients()  # builds, allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        dq, dk, dv = gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    good = [0, 2, 4, 5]
    assert dq[:, [1, 3]].isnan().all()
    assert_gradients_close(
        {"q": dq[:, good], "k": dk, "v": dv}, q[:, good], k, v, [0, 1, 2, 2],
        dout=dout[:, good], causal=True,
    )  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("kind", ["dropout", "packed"])
def test_training_does_not_synchronise(kind):
    q, k, v = make_inputs(
        1, UNEVEN, 300, 300, 64, dtype=torch.bfloat16, device="cuda", layout="bshd"
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    offsets = torch.tensor([0, 17, 17, 290], device="cuda", dtype=torch.int32)

    def gradients():
        if kind == "dropout":
            out = asym_gqa_attention(
                *leaves, UNEVEN, causal=True, dropout_p=0.1, layout="bshd", backend="cuda"
            )
        else:
            packed = (x[0] for x in leaves)
            out = asym_gqa_varlen_attention(
                *packed, UNEVEN, offsets, offsets, 300, 300, causal=True, backend="cuda"
            )
        return torch.autograd.grad(out, leaves, out.detach().clone())

    gradients()  # builds, allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_backward_in_a_captured_graph_reads_the_current_map():
    q, k, v = make_inputs(1, UNEVEN, 150, 170, 64, dtype=torch.bfloat16, device="cuda")
    head_map = UNEVEN.tensor("cuda").clone()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)

    def gradients():
        out = asym_gqa_attention(*leaves, head_map, causal=True, backend="cuda")
        return torch.autograd.grad(out, leaves, dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients()
    for entries in [0, 0, 0, 1, 2, 2], [2, 1, 0, 0, 0, 0]:
        head_map.copy_(torch.tensor(entries))
        graph.replay()
        torch.cuda.synchronize()
        assert_gradients_close(
            dict(zip("qkv", found, strict=True)), q, k, v, HeadMap(entries, 3), dout=dout,
            causal=True,
        )  # fmt: skip


@needs_gpu
def test_backward_errors_name_the_rule_and_the_value():
    CUDABackend().prepare()
    q, k, v = make_inputs(1, UNEVEN, 20, 30, 64, dtype=torch.bfloat16, device="cuda")
    lse = torch.zeros(1, 6, 20, device="cuda")
    seed = torch.zeros(2, dtype=torch.int64, device="cuda")

    def call(dout=q, lse=lse, dropout_p=0.0, need_sinks=False):
        torch.ops.gqa_kernels.attention_backward.default(
            dout,
            None,
            q,
            k,
            v,
            q,
            lse,
            UNEVEN.tensor("cuda"),
            dropout_p=dropout_p,
            dropout_seed=seed,
            need_sinks=need_sinks,
        )

    call()
    for arguments, message in [
        ({"dout": q.cpu()}, "dout must be on cuda:0 as q is"),
        ({"lse": lse[:, :, :5]}, r"lse must have shape \(1, 6, 20\), got \(1, 6, 5\)"),
        ({"dropout_p": 1.5}, r"dropout_p must lie in \[0, 1\), got 1.5"),
        ({"need_sinks": True}, "sinks must be given with need_sinks"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)
