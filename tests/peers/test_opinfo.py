"""PyTorch's own samples of scaled_dot_product_attention, at PyTorch's tolerance.

Their values lie in [-9, 9], so their scores are large: gradients in which an error of the scores
or of the LSE shows.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from gqa_kernels.sdpa import scaled_dot_product_attention
from gqa_kernels.testing import GRADIENT_FACTOR


@pytest.fixture(scope="module")
def samples():
    """Those without dropout, whose random numbers are each library's own."""
    pytest.importorskip("expecttest")  # which the next module imports
    methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (op,) = (x for x in methods.op_db if x.name == "nn.functional.scaled_dot_product_attention")
    torch.manual_seed(0)
    found = list(op.sample_inputs("cpu", torch.float32, requires_grad=True))
    return [x for x in found if x.kwargs["dropout_p"] == 0.0]


def broadcast(sample):
    """q, k, v with the same leading dims, and the options. Ours takes no q without heads over keys
    that have heads."""
    options = {name: x for name, x in sample.kwargs.items() if name != "dropout_p"}
    tensors = [sample.input, *sample.args]
    leading = torch.broadcast_shapes(*(x.shape[:-2] for x in tensors))
    return [x.detach().expand(*leading, *x.shape[-2:]) for x in tensors], options


def gradients(function, tensors, options, dtype, order=None):
    """out, dq, dk, dv; inside the call the head dims are in another order."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        options = options | {"attn_mask": mask.detach().to(dtype)}
    order = torch.arange(leaves[0].shape[-1]) if order is None else order
    out = function(*(x[..., order] for x in leaves), **options)[..., order.argsort()]
    dout = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
    return out, *torch.autograd.grad(out, leaves, dout)


def hold(tensors, options):
    """At PyTorch's default tolerance for fp32. Its own function misses that in some samples, in
    others with the head dim in another order; there, at most three times its error (the rule of
    :mod:`gqa_kernels.testing` for gradients)."""
    exact = gradients(sdpa, tensors, options, torch.float64)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(tensors[0].shape[-1], generator=generator) for _ in range(8)]
    theirs = [gradients(sdpa, tensors, options, torch.float32, x) for x in (None, *orders)]
    ours = gradients(scaled_dot_product_attention, tensors, options, torch.float32)
    for a, b, *forms in zip(ours, exact, *theirs, strict=True):
        worst = max((x - b).abs().max().item() for x in forms)
        torch.testing.assert_close(
            a.double(), b, rtol=1.3e-6, atol=max(1e-5, GRADIENT_FACTOR * worst)
        )


def test_results_and_gradients(samples):
    assert samples
    for sample in samples:
        hold(*broadcast(sample))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [5.0, 20.0])
def test_larger_scores(size, is_causal):
    """Scores to 2,000 and 30,000: P is 0 or 1 in most rows, and dV then exact."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(4, 4, n, 8, generator=generator) * 18 - 9 for n in (3, 6, 6))
    hold([q * size, k * size, v], {"is_causal": is_causal})
