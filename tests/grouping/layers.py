"""Random attention layers and inputs, and what they compute, token by token."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from gqa_kernels import HeadMap
from gqa_kernels.models.weights import LayerWeights, Rotary

D, DV, WIDTH = 8, 6, 20
FREQUENCIES = (1.0, 0.5, 0.25, 0.1)
ROTARY = {
    "none": None,
    "half_split": Rotary(8, "half_split", FREQUENCIES),
    "interleaved": Rotary(8, "interleaved", FREQUENCIES),
    "partial": Rotary(4, "half_split", FREQUENCIES[:2]),
}


def layer(
    rotary: str = "none", num_heads: int = 6, num_kv_heads: int = 6, bias: bool = True,
    norm: bool = False, seed: int = 0,
) -> LayerWeights:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head_map = HeadMap.uniform(num_heads, num_kv_heads)
    biases = {}
    if bias:
        biases = {
            "q_bias": random(num_heads, D), "k_bias": random(num_kv_heads, D),
            "v_bias": random(num_kv_heads, DV), "o_bias": random(WIDTH),
        }  # fmt: skip
    norms = {"q_norm": 0.5 + random(D).abs(), "k_norm": 0.5 + random(D).abs()} if norm else {}
    return LayerWeights(
        random(num_heads, D, WIDTH), random(num_kv_heads, D, WIDTH),
        random(num_kv_heads, DV, WIDTH), random(WIDTH, num_heads, DV), head_map, head_map,
        rotary=ROTARY[rotary], **biases, **norms,
    )  # fmt: skip


def tokens(count: int = 200, seed: int = 1) -> Tensor:
    """``[n, d]`` inputs with a mean and correlated dims."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return x @ mix / 4 + torch.randn(WIDTH, generator=generator, dtype=torch.float64)


def moments(x: Tensor) -> SimpleNamespace:
    """As ``calibrate`` would give them; each token stands at its own position."""
    return SimpleNamespace(
        mean=x.mean(0), second_moment=x.T @ x / len(x), query=None,
        position_mean=x, position_count=torch.ones(len(x)),
    )  # fmt: skip


def computed(weights: LayerWeights, side: str, x: Tensor) -> Tensor:
    """``[n, H, D]``: the heads of a side for every token."""
    bias = getattr(weights, f"{side}_bias")
    heads = torch.einsum("nd,hed->nhe", x, getattr(weights, side))
    return heads if bias is None else heads + bias


def rotation(rotary: Rotary, position: float, dim: int = D) -> Tensor:
    """``[D, D]`` rotary embedding of a position, plane by plane."""
    out = torch.eye(dim, dtype=torch.float64)
    half = rotary.dim // 2
    for p, frequency in enumerate(rotary.frequencies):
        a, b = (p, p + half) if rotary.layout == "half_split" else (2 * p, 2 * p + 1)
        angle = torch.tensor(position * frequency, dtype=torch.float64)
        out[a, a] = out[b, b] = angle.cos()
        out[b, a], out[a, b] = angle.sin(), -angle.sin()
    return out


def scores(weights: LayerWeights, x: Tensor) -> Tensor:
    """``[Hq, n, n]`` scores of all pairs of tokens; token ``i`` stands at position ``i``."""
    q, k = computed(weights, "q", x), computed(weights, "k", x)[:, list(weights.key_map)]
    for name in ("q", "k"):
        norm = getattr(weights, f"{name}_norm")
        if norm is not None:
            head = q if name == "q" else k
            head = head / (head.square().mean(-1, keepdim=True) + weights.norm_eps).sqrt() * norm
            q, k = (head, k) if name == "q" else (q, head)
    if weights.rotary is not None:
        turns = torch.stack([rotation(weights.rotary, i) for i in range(len(x))])
        q, k = (torch.einsum("nab,nhb->nha", turns, head) for head in (q, k))
    return torch.einsum("ihd,jhd->hij", q, k)


def attention(weights: LayerWeights, x: Tensor) -> Tensor:
    """``[n, d_out]`` output of one sequence, every token seeing all."""
    scale = weights.scale or weights.q.shape[1] ** -0.5
    shares = (scores(weights, x) * scale).softmax(-1)
    v = computed(weights, "v", x)[:, list(weights.value_map)]
    out = torch.einsum("hij,jhe,ohe->io", shares, v, weights.o)
    return out if weights.o_bias is None else out + weights.o_bias


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
