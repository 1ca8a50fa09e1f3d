"""Attention with uneven, interleaved groups: prefill, gradients, and decode over a cache.

python examples/attention.py
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from gqa_kernels import DenseKVCache, HeadMap, asym_gqa_attention, asym_gqa_decode

torch.manual_seed(0)
head_map = HeadMap([0, 3, 0, 1, 2, 0, 1, 4, 2])  # 9 query heads over 5 KV heads
print(f"groups: {head_map.groups}")

q = torch.randn(2, 9, 128, 64, requires_grad=True)  # [B, Hq, Sq, D]
k = torch.randn(2, 5, 128, 64, requires_grad=True)  # [B, Hkv, Sk, D]
v = torch.randn(2, 5, 128, 64)
out = asym_gqa_attention(q, k, v, head_map, causal=True)

# The same by expanding K and V, as an ordinary kernel needs it.
index = torch.tensor(head_map.entries)
expected = scaled_dot_product_attention(q, k[:, index], v[:, index], is_causal=True)
print(f"prefill: differs from expand + SDPA by {(out - expected).abs().max():.1e}")

out.sum().backward()
print(f"gradient of k: {tuple(k.grad.shape)}, summed over each group")

cache = DenseKVCache.empty(batch=2, num_kv_heads=5, capacity=256, head_dim=64, dtype=torch.float32)
cache.append(k.detach(), v)
for _ in range(4):
    new_q, new_k, new_v = (torch.randn(2, heads, 1, 64) for heads in (9, 5, 5))
    out = asym_gqa_decode(new_q, cache, head_map, k_new=new_k, v_new=new_v)
print(f"decode: {cache.lengths.tolist()} keys cached, output {tuple(out.shape)}")
