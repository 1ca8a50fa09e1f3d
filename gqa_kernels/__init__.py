"""Attention kernels for asymmetric grouped-query attention."""

from .attention import asym_gqa_attention
from .backends.dispatch import available_backends, explain_backend
from .head_map import HeadMap
from .version import __version__

__all__ = [
    "HeadMap",
    "__version__",
    "asym_gqa_attention",
    "available_backends",
    "explain_backend",
]
