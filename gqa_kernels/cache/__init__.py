"""KV caches: dense, paged and quantised memory, one normalised view of it, and page allocation.

    view.py       KVView: where K and V lie, in the one form that every kernel reads
    formats.py    storage formats fp8, int8 and int4: what a stored number means
    tensors.py    what is asked of any tensor: types, layouts, readable values
    base.py       KVCache: what the two caches share
    dense.py      DenseKVCache
    paged.py      PagedKVCache
    allocator.py  PageAllocator: pages of sequences, shared prefixes with copy-on-write
    memory.py     allocation in huge pages

Memory only: what attends to a cache or appends to it is in :mod:`gqa_kernels.decode`.
"""
