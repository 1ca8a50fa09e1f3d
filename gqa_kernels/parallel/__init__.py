"""Attention and models on several devices. Each module is imported on demand.

tensor             models split across ranks by query heads, with the KV heads they read
shard_checkpoint   the same for a checkpoint on disk
context, ring      attention over keys on several ranks
ulysses            attention over tokens on several ranks, which exchange tokens for heads
dtensor            ``register()``: placements of our ops for ``torch.distributed.tensor``
"""
