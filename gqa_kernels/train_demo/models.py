"""A pre-norm transformer around AsymGroupedQueryAttention."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import AsymGroupedQueryAttention
from .settings import Settings

ROTARY_BASE = 10000.0


class Block(nn.Module):
    """Attention and a feed-forward layer, each with its residual."""

    def __init__(self, width: int, attention: AsymGroupedQueryAttention):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), attention
        self.forward_norm = nn.LayerNorm(width)
        self.forward_layer = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attention(self.attention_norm(x), causal=causal)
        return x + self.forward_layer(self.forward_norm(x))


class Transformer(nn.Module):
    """Embedding, blocks, head. A causal model has one output per token, others one per sequence:
    the mean.

    Args:
        embedding: maps the inputs of a batch to ``[B, S, width]``.
        num_outputs: number of classes.
        num_kv_heads: KV heads of every layer.
        allocation: the allocation of every layer, see AsymGroupedQueryAttention.
    """

    def __init__(
        self,
        embedding: nn.Module,
        num_outputs: int,
        causal: bool,
        settings: Settings,
        num_kv_heads: int,
        allocation: str | None = None,
    ):
        super().__init__()
        width = settings.num_heads * settings.head_dim
        self.causal, self.embedding = causal, embedding
        self.blocks = nn.ModuleList(
            Block(
                width,
                AsymGroupedQueryAttention(
                    width, settings.num_heads, num_kv_heads, allocation=allocation,
                    window=settings.window, rotary_base=ROTARY_BASE, backend=settings.backend,
                ),
            )
            for _ in range(settings.num_layers)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.embedding(inputs)
        for block in self.blocks:
            x = block(x, self.causal)
        x = self.norm(x)
        return self.head(x if self.causal else x.mean(1))
