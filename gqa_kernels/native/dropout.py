"""Which probabilities dropout keeps: a function of a seed and the element's position only.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). So the
forward, the backward and every backend agree without a stored mask::

    key     = 64-bit seed, low word first
    counter = (j // 4, i, b * Hq + h, offset), lane j % 4, of query token i and key token j
    keep if lane >= floor(dropout_p * 2**32)
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A call's (seed, offset), int64 ``[2]``, from torch's default generator of the device."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)


def philox(seed: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The four 32-bit words of Philox4x32-10, as int64 tensors.

    Args:
        counter: four int64 tensors of 32-bit words, with shapes that broadcast.
        counter: four int64 tensors of 32-bit words, of shapes that broadcast.
    """
    c0, c1, c2, c3 = counter
    low, high = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        x, y = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # 64-bit products wrap, bits are right
        c0, c2 = ((y >> 32) & WORD) ^ c1 ^ low, ((x >> 32) & WORD) ^ c3 ^ high
        c1, c3 = y & WORD, x & WORD
        low, high = (low + KEY_STEPS[0]) & WORD, (high + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def keep_mask(
    seed: Tensor, dropout_p: float, batch: int, num_heads: int, q_len: int, kv_len: int
) -> Tensor:
    """Boolean ``[B, Hq, Sq, Sk]``: True for the probabilities that dropout keeps.

    Args:
        seed: (seed, offset), int64 ``[2]``.
    """

    def index(n: int, *shape: int) -> Tensor:
        return torch.arange(n, device=seed.device).view(shape)

    lanes = philox(
        seed[0],
        (
            index((kv_len + 3) // 4, 1, 1, -1),
            index(q_len, 1, -1, 1),
            index(batch * num_heads, -1, 1, 1),
            seed[1] & WORD,
        ),
    )
    padded_kv_len = (kv_len + 3) // 4 * 4
    words = torch.stack(lanes, -1).view(batch, num_heads, q_len, padded_kv_len)[..., :kv_len]
    return words >= int(dropout_p * 2**32)
