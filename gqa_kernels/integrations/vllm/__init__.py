"""vLLM: the attention backend ``ASYM_GQA`` and LLaMA models with head maps.

Installed beside vLLM, the package registers itself through the entry point
``vllm.general_plugins``; elsewhere call :func:`register` once before a model is built. Then::

    vllm serve <even model> --attention-backend ASYM_GQA
    vllm serve <converted model> --hf-overrides '{"architectures": ["AsymGQALlamaForCausalLM"]}'

The first runs any model that vLLM's own backends run. The second carries the maps of a converted
LLaMA checkpoint (``config.kv_head_map``) past vLLM's rule that KV heads divide query heads.
"""

from __future__ import annotations

OLDEST = "0.33"  # first release tested
BACKEND = "ASYM_GQA"
ARCHITECTURE = "AsymGQALlamaForCausalLM"


def register() -> None:
    """Make the backend and the model class known to vLLM; more than one call does no harm.

    Raises:
        ImportError: vLLM is missing or too old.
    """
    try:
        from vllm.model_executor.models.registry import ModelRegistry
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        raise ImportError(
            f"gqa_kernels.integrations.vllm needs vllm >= {OLDEST} "
            f"(pip install 'vllm>={OLDEST}'): {error}"
        ) from error
    if not hasattr(AttentionBackendEnum, "register"):
        raise ImportError(
            f"gqa_kernels.integrations.vllm needs vllm >= {OLDEST}: this one can't register an "
            "attention backend under a name of its own"
        )
    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, f"{__name__}.backend.AsymGQABackend")
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.llama:{ARCHITECTURE}")
