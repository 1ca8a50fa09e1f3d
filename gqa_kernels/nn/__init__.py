"""Modules for training: attention whose head map is fixed, or follows the keys while it trains.

attention.py    AsymGroupedQueryAttention
allocation.py   how many query heads each KV head gets, from key norms
rotary.py       rotary position embedding
"""

from .allocation import ALLOCATIONS
from .attention import AsymGroupedQueryAttention, step_allocations

__all__ = ["ALLOCATIONS", "AsymGroupedQueryAttention", "step_allocations"]
