"""Ways into other libraries, and over several devices; imported only on demand.

transformers, vllm, sglang, dtensor   one ``register()`` each
hf_kernels, hf_kernel_entry           the package as a Hugging Face kernel repository
tensor_parallel, shard_checkpoint     models and checkpoints cut over ranks
context_parallel, context_ring        attention over keys on several ranks
"""
