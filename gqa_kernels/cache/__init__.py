"""KV caches: dense, paged and quantised memory, one normalised view of it, and page allocation.

    view.py       KVView: where K and V lie, in the one form that every kernel reads
    quantized.py  storage formats fp8, int8 and int4: what a stored number means
    inputs.py     checked calls: attention over a view, append to a view
    dense.py      DenseKVCache
    paged.py      PagedKVCache
    allocator.py  PageAllocator: pages of sequences, shared prefixes with copy-on-write
    decode.py     asym_gqa_decode and the planner behind it
    cascade.py    merge of attention states, shared-prefix attention

The public names are those of :mod:`gqa_kernels`; backends import the first three files only.
"""
