"""Train a tiny language model whose head maps follow the norms of the keys (KDGQA).

It learns to repeat the first half of a sequence. Prints the loss and the group sizes.

    python examples/train.py --steps 150
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gqa_kernels.nn import AsymGroupedQueryAttention, step_allocations

VOCABULARY, LENGTH, WIDTH, HEADS, KV_HEADS = 32, 16, 64, 8, 4


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a residual connection."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = AsymGroupedQueryAttention(
            WIDTH, HEADS, KV_HEADS, allocation="kdgqa", rotary_base=10000.0
        )
        self.feed_forward = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        x = x + self.attention(self.norms[0](x), causal=True)
        return x + self.feed_forward(self.norms[1](x))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    blocks = [Block(), Block()]
    model = nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        half = torch.randint(VOCABULARY, (32, LENGTH))
        tokens = torch.cat([half, half], 1)
        logits = model(tokens[:, :-1])[:, LENGTH - 1 :]  # where the answer is known
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, LENGTH:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step_allocations(model)  # a KV head with larger keys gets more query heads
        if step % 50 == 0 or step == steps - 1:
            sizes = [b.attention.head_map.bincount(minlength=KV_HEADS).tolist() for b in blocks]
            print(f"step {step}: loss {loss.item():.3f}, group sizes {sizes}")


if __name__ == "__main__":
    main()
