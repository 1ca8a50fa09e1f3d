"""The public names of the package, which ``gqa_kernels`` takes from here when one is first used."""

from .attention import asym_gqa_attention
from .backends.dispatch import available_backends
from .cache.allocator import OutOfPages, PageAllocator
from .cache.dense import DenseKVCache
from .cache.paged import PagedKVCache
from .call.auxiliary import AuxOutput, AuxRequest
from .cascade import merge_attention_states, shared_prefix_attention
from .decode import asym_gqa_decode, plan_decode
from .explain import explain_backend
from .head_map import HeadMap
from .varlen import asym_gqa_varlen_attention
from .version import __version__

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "DenseKVCache",
    "HeadMap",
    "OutOfPages",
    "PageAllocator",
    "PagedKVCache",
    "__version__",
    "asym_gqa_attention",
    "asym_gqa_decode",
    "asym_gqa_varlen_attention",
    "available_backends",
    "explain_backend",
    "merge_attention_states",
    "plan_decode",
    "shared_prefix_attention",
]
