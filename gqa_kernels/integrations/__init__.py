"""Integrations with other libraries. Each is imported on demand.

transformers, vllm, sglang   one ``register()`` each
hf_kernels                   the package as a Hugging Face kernel repository
engine_layer                 what the attention layers of engines share
"""
