"""The attention module: the map as state, allocations, gradients, compilation."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from gqa_kernels import HeadMap
from gqa_kernels.nn import ALLOCATIONS, AsymGroupedQueryAttention, step_allocations

MAP = [0, 2, 0, 1, 2, 0]


def module(**options):
    torch.manual_seed(0)
    return AsymGroupedQueryAttention(24, 6, 3, **options)


def test_computes_attention_on_expanded_heads():
    attention = module(head_map=MAP, bias=True)
    x = torch.randn(2, 7, 24)
    q = attention.q_proj(x).view(2, 7, 6, 4).transpose(1, 2)
    k, v = (
        proj(x).view(2, 7, 3, 4).transpose(1, 2)[:, MAP]
        for proj in (attention.k_proj, attention.v_proj)
    )
    expected = sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x, causal=True), attention.out_proj(expected))


def test_rotary_scores_depend_on_distance_alone():
    attention = module(head_map=MAP, rotary_base=10000.0)
    x = torch.randn(2, 7, 24)
    near = attention(x, causal=True)
    far = attention(x, causal=True, positions=torch.arange(7).expand(2, 7) + 100)
    torch.testing.assert_close(near, far, atol=1e-5, rtol=1e-4)
    assert (near - module(head_map=MAP)(x, causal=True)).abs().max() > 1e-3


def test_default_map_and_state_dict():
    assert module().head_map.tolist() == list(HeadMap.uniform(6, 3))
    trained, fresh = module(head_map=MAP, allocation="dgqa-ema"), module(allocation="dgqa-ema")
    trained.allocation.steps += 7
    fresh.load_state_dict(trained.state_dict())
    assert fresh.head_map.tolist() == MAP and fresh.allocation.steps == 7


def test_allocation_keeps_norms_in_fp32():
    """Two norms that are equal in bf16: their order decides which one gets the odd head."""
    attention = AsymGroupedQueryAttention(20, 5, 2, allocation="dgqa-ema", window=1).bfloat16()
    assert attention.k_proj.weight.dtype == torch.bfloat16
    attention(torch.randn(1, 4, 20, dtype=torch.bfloat16)).sum().backward()
    attention.allocation.norms.copy_(torch.tensor([1.0, 1.001]))
    step_allocations(attention)
    assert attention.head_map.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("kind", ALLOCATIONS)
def test_allocation_moves_in_training_and_stays_in_evaluation(kind):
    attention = module(allocation=kind, window=2)
    x = torch.randn(2, 7, 24)
    with torch.no_grad():
        attention.k_proj.weight[:4] *= 5  # KV head 0
    for _ in range(4):
        attention(x).sum().backward()
        step_allocations(torch.nn.Sequential(attention))
        x = x * 1.5
    trained = attention.head_map.clone()
    assert trained.tolist() != module().head_map.tolist()
    assert trained.bincount(minlength=3)[0] == max(trained.bincount())
    attention.eval()
    whole, alone = attention(x), attention(x[:1])
    torch.testing.assert_close(whole[:1], alone)  # whatever else is in the batch
    assert torch.equal(attention.head_map, trained)


def test_backward_uses_the_map_of_its_forward():
    """Two forwards before one backward, with another map between them."""
    attention = module(head_map=MAP)
    x = torch.randn(1, 5, 24)
    expected = torch.autograd.grad(attention(x).square().sum(), attention.k_proj.weight)
    out = attention(x)
    attention.set_head_map([1, 1, 1, 0, 0, 2])
    attention(x)
    found = torch.autograd.grad(out.square().sum(), attention.k_proj.weight)
    assert torch.equal(expected[0], found[0])


def test_perturbation_and_dropout_are_for_training():
    x = torch.randn(2, 5, 24)
    attention = module(head_map=MAP, perturbation=0.5, dropout=0.5)
    plain = module(head_map=MAP)
    assert not torch.equal(attention(x), attention(x))
    torch.testing.assert_close(attention.eval()(x), plain(x))
    noisy = module(head_map=MAP, perturbation=0.5)
    noisy(x).sum().backward()
    assert noisy.q_proj.weight.grad.isfinite().all()


def test_changing_the_map_compiles_once():
    """1,000 maps, forward and backward, in one compilation of each."""
    torch._dynamo.reset()
    attention = module(head_map=MAP)
    compilations = 0

    def counting(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(
        attention, fullgraph=True, backend=aot_autograd(fw_compiler=counting, bw_compiler=counting)
    )
    x = torch.randn(1, 3, 24)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 3, (1000, 6), generator=generator)
    for i, head_map in enumerate(maps):
        attention.set_head_map(head_map)
        attention.zero_grad()
        out = compiled(x, causal=True)
        out.square().sum().backward()
        if i % 250 == 0:
            grad = attention.k_proj.weight.grad.clone()
            attention.zero_grad()
            eager = attention(x, causal=True)
            eager.square().sum().backward()
            torch.testing.assert_close(out, eager)
            torch.testing.assert_close(grad, attention.k_proj.weight.grad)
    assert compilations == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ALLOCATIONS)
def test_allocations_compile_once(kind):
    torch._dynamo.reset()
    attention, eager = module(allocation=kind, window=1), module(allocation=kind, window=1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    x = torch.randn(2, 5, 24)
    for _ in range(4):
        torch.testing.assert_close(compiled(x), eager(x))
        step_allocations(attention)
        step_allocations(eager)
        assert torch.equal(attention.head_map, eager.head_map)
        x = x.flip(-1)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ALLOCATIONS)
def test_allocations_with_activation_checkpointing(kind):
    """The forward that is run again has the map of the first, and writes the same one."""
    results = []
    for recompute in (False, True):
        attention, x = module(allocation=kind, window=1, dropout=0.2), torch.randn(2, 5, 24)
        gradients = []
        for _ in range(3):
            attention.zero_grad()
            if recompute:
                out = torch.utils.checkpoint.checkpoint(attention, x, use_reentrant=False)
            else:
                out = attention(x)
            out.square().sum().backward()
            gradients += [p.grad for p in attention.parameters()]
            step_allocations(attention)
            x = x.flip(-1)
        results.append((gradients, attention.state_dict()))
    (expected, state), (found, state_again) = results
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, state_again.values(), state.values()))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"embed_dim": 25}, r"embed_dim must be a multiple of num_heads \(6\)"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"head_map": [0, 1]}, r"head_map must have one entry per query head \(6\), got 2"),
        ({"head_map": [0, 1, 2, 3, 0, 0]}, r"head_map entries must lie in \[0, 3\)"),
        ({"embed_dim": 30, "rotary_base": 1e4}, "head_dim must be even with rotary_base, got 5"),
    ],
)
def test_bad_arguments(options, message):
    arguments = {"embed_dim": 24, "num_heads": 6, "num_kv_heads": 3, **options}
    with pytest.raises(ValueError, match=message):
        AsymGroupedQueryAttention(**arguments)
