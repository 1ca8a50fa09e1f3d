"""Ways into other libraries; each is imported on demand.

transformers, vllm, sglang   one ``register()`` each
hf_kernels                   the package as a Hugging Face kernel repository
engine_layer                 what the engines' attention layers have in common
"""
