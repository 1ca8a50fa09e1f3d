"""Keep other keys in each KV head, and compare with a mask over a full cache.

python examples/ragged_cache.py --keys 4096
"""

import argparse
import time

import torch

from gqa_kernels import AuxRequest, DenseKVCache, HeadMap, asym_gqa_decode
from gqa_kernels.testing import assert_decode_close

HEADS, HEAD_DIM = 4, 64


def median_ms(function, repeats=20):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=4096)
    keys = parser.parse_args().keys
    torch.manual_seed(0)
    head_map = HeadMap.from_group_sizes([7, 4, 3, 2])
    cache = DenseKVCache.empty(1, HEADS, keys, HEAD_DIM, dtype=torch.float32)
    cache.append(*(torch.randn(1, HEADS, keys, HEAD_DIM) for _ in range(2)))
    q = torch.randn(1, head_map.num_heads, 1, HEAD_DIM)

    # What the last query gives to each key decides which keys a head keeps.
    _, aux = asym_gqa_decode(q, cache, head_map, return_aux=AuxRequest(key_scores=1))
    budgets = torch.tensor([[keys // 2, keys // 4, keys // 8, keys // 16]])
    kept = aux.key_scores.argsort(-1, descending=True).argsort(-1) < budgets[..., None]

    mask = kept[:, list(head_map)][:, :, None]  # [B, Hq, 1, keys], over the full cache
    masked = asym_gqa_decode(q, cache, head_map, attn_mask=mask)
    masked_ms = median_ms(lambda: asym_gqa_decode(q, cache, head_map, attn_mask=mask))

    cache.keep(kept)
    ragged = asym_gqa_decode(q, cache, head_map)
    ragged_ms = median_ms(lambda: asym_gqa_decode(q, cache, head_map))
    assert_decode_close(ragged, q, cache, head_map)

    print(f"keys kept per head: {cache.lengths.tolist()[0]} of {keys}")
    print(f"the outputs differ by {(ragged - masked).abs().max():.1e}")
    print(f"decode step: {masked_ms:.2f} ms with a mask, {ragged_ms:.2f} ms on the kept keys")


if __name__ == "__main__":
    main()
