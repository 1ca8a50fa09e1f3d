"""torch.compile without graph breaks, on every backend."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from gqa_kernels import (
    DenseKVCache,
    HeadMap,
    asym_gqa_attention,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
)
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.testing import assert_attention_close, make_inputs
from tests.api.test_attention import USABLE, widest

MAP = HeadMap([0, 2, 0, 1])


class Attention(nn.Module):
    """A module as users write it: the map as an attribute, projections around the call."""

    def __init__(self, head_map, backend: str, **options):
        super().__init__()
        self.head_map, self.backend, self.options = head_map, backend, options

    def forward(self, q, k, v):
        out, lse = asym_gqa_attention(
            q * 1.0, k, v, self.head_map, return_lse=True, backend=self.backend, **self.options
        )
        return out + 0.0, lse


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module, dynamic=None):
    return torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")


OPTIONS = {
    "causal": {"causal": True},
    "everything": {
        "window": (6, 2),
        "softcap": 2.0,
        "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.0]),
        "sinks": torch.tensor([1.0, 0.0, -1.0, 2.0]),
        "attn_mask": torch.randn(4, 1, 9, generator=torch.Generator().manual_seed(0)),
        "kv_lengths": torch.tensor([4, 9]),
        "value_head_map": HeadMap([1, 0, 0, 2]),
    },
}


@pytest.mark.parametrize("backend", ["auto", *USABLE])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_fullgraph(backend, options, layout, device):
    options = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    dtype = torch.float32 if backend == "auto" else widest(backend)
    q, k, v = make_inputs(2, MAP, 7, 9, 16, dtype=dtype, device=device, layout=layout)
    module = Attention(MAP, backend, layout=layout, **options)
    for _ in range(2):
        out, lse = compiled(module)(q, k, v)
        assert_attention_close(out, q, k, v, MAP, lse=lse, layout=layout, **options)


@pytest.mark.parametrize("backend", USABLE)
def test_changing_shapes_and_map_tensors_compile_once(backend, device):
    """Dynamic shapes; and a map in a tensor may change with no compilation."""
    count = 0

    def counting(graph, inputs):
        nonlocal count
        count += 1
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def call(q, k, v, head_map):
        return asym_gqa_attention(q, k, v, head_map, causal=True, backend=backend)

    for step, (q_len, kv_len) in enumerate([(18, 33), (19, 40), (23, 51)]):
        entries = [(h * (step + 1) + step) % 3 for h in range(4)]
        head_map = torch.tensor(entries, dtype=torch.int32, device=device)
        q, k, v = make_inputs(
            2, HeadMap(entries, 3), q_len, kv_len, 16, dtype=widest(backend), device=device
        )
        assert_attention_close(call(q, k, v, head_map), q, k, v, entries, causal=True)
    assert count == 1


@pytest.mark.parametrize("backend", USABLE)
def test_bad_entry_of_a_map_tensor_gives_nan(backend, device):
    """In a compiled graph, as on an accelerator, the host can't look at the map."""
    for q_len, dtype, large in ((1, torch.int32, 7), (20, torch.int64, 2**32 + 1)):
        head_map = torch.tensor([0, large, 1, -1], dtype=dtype, device=device)
        q, k, v = make_inputs(
            2, HeadMap([0, 1, 1, 0]), q_len, 9, 16, dtype=widest(backend), device=device
        )
        out, lse = compiled(Attention(head_map, backend))(q, k, v)
        assert out[:, [1, 3]].isnan().all() and lse[:, [1, 3]].isnan().all()
        good = asym_gqa_attention(q[:, [0, 2]], k, v, [0, 1], backend=backend)
        torch.testing.assert_close(out[:, [0, 2]], good)


@pytest.mark.parametrize("backend", USABLE)
def test_inductor(backend, device):
    q, k, v = make_inputs(2, MAP, 7, 9, 16, dtype=widest(backend), device=device)
    module = torch.compile(Attention(MAP, backend, causal=True), fullgraph=True)
    out, lse = module(q, k, v)
    assert_attention_close(out, q, k, v, MAP, lse=lse, causal=True)


def fresh_process(code: str) -> subprocess.CompletedProcess:
    """Code in a process of its own, in which nothing of the package has run yet."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=600
    )


FIRST_CALLS = {
    "attention": "asym_gqa_attention(q, k, k, head_map, causal=True)",
    "a map as a list": "asym_gqa_attention(q, k, k, [0, 1, 0, 2, 0, 0], softcap=2.0)",
    "decode": "asym_gqa_decode(q, DenseKVCache(k, k, lengths), head_map)",
    "varlen": "asym_gqa_varlen_attention(q[0].transpose(0, 1), k[0].transpose(0, 1),"
    " k[0].transpose(0, 1), head_map, cu_q, cu_k, q.shape[2], k.shape[2])",
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("call", FIRST_CALLS.values(), ids=FIRST_CALLS)
def test_first_use_in_a_process(call, dynamic):
    """Dynamo traces again after a graph break, and must then find the state unchanged."""
    done = fresh_process(
        f"""
        import torch
        from gqa_kernels import (
            DenseKVCache, HeadMap, asym_gqa_attention, asym_gqa_decode, asym_gqa_varlen_attention
        )
        head_map = HeadMap([0, 1, 0, 2, 0, 0], 3)
        q, k = torch.randn(2, 6, 23, 16), torch.randn(2, 3, 23, 16)
        lengths = torch.tensor([23, 7], dtype=torch.int32)
        cu_q, cu_k = torch.tensor([0, q.shape[2]]), torch.tensor([0, k.shape[2]])
        def f(q, k):
            out = {call}
            torch._dynamo.graph_break()
            return out + 1
        out = torch.compile(f, backend="aot_eager", dynamic={dynamic})(q, k)
        torch.testing.assert_close(out, f(q, k))
        """
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("option", ["scale", "softcap", "dropout_p"])
@pytest.mark.parametrize("function", ["attention", "decode", "varlen"])
def test_numbers_that_change(function, option, dynamic, backend, device):
    if option == "dropout_p" and function == "decode":
        pytest.skip("has no dropout")
    options = BACKENDS[backend].capabilities.options
    if option == "dropout_p" and function == "varlen" and "varlen_dropout" not in options:
        pytest.skip("has no dropout over packed queries")
    dtype = widest(backend)
    q, k, v = make_inputs(1, MAP, 5, 9, 16, dtype=dtype, device=device)
    offsets = [torch.tensor([0, n], device=device) for n in (5, 9)]
    lengths = torch.tensor([9], dtype=torch.int32, device=device)

    def call(q, k, v, x):
        options = {option: x, "backend": backend}
        if function == "attention":
            return asym_gqa_attention(q, k, v, MAP, **options)
        if function == "decode":
            return asym_gqa_decode(q, DenseKVCache(k, v, lengths), MAP, **options)
        packed = (y[0].transpose(0, 1) for y in (q, k, v))
        return asym_gqa_varlen_attention(*packed, MAP, *offsets, 5, 9, **options)

    graph = compiled(call, dynamic)
    for x in (0.3, 0.4, 0.5):
        torch.manual_seed(0)
        found = graph(q, k, v, x)
        torch.manual_seed(0)
        torch.testing.assert_close(found, call(q, k, v, x))
