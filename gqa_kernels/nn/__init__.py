"""Modules for training: attention with a head map that is fixed, or that follows the keys' norms.

attention.py    AsymGroupedQueryAttention
allocation.py   how many query heads each KV head gets, from key norms
rotary.py       rotary position embedding
"""

from .allocation import ALLOCATIONS
from .attention import AsymGroupedQueryAttention, step_allocations

__all__ = ["ALLOCATIONS", "AsymGroupedQueryAttention", "step_allocations"]
