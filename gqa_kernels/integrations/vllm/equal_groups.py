"""What stops vLLM's own model classes from running a model with uneven maps: they ignore the maps.

A checkpoint that this package wrote names one of our classes. But its config may have been edited,
or a user may name another class (``--hf-overrides``).
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from ...models.maps import KEY_FIELD, is_uneven


def register(architecture: str) -> None:
    """Let vLLM look before it builds a model of this class, after what it does for the class."""
    stock = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
    if getattr(stock, "refuses_uneven", False):
        return

    class Even(stock):
        refuses_uneven = True

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            super().verify_and_update_config(vllm_config)
            refuse(vllm_config.model_config)

    MODELS_CONFIG_MAP[architecture] = Even


def refuse(model: Any) -> None:
    """Raise NotImplementedError if a model has uneven maps.

    Args:
        model: vLLM's ``ModelConfig``, or None.
    """
    if model is not None and is_uneven(model.hf_text_config):
        raise NotImplementedError(
            f"a model with config.{KEY_FIELD} must be loaded by a model class that reads it, got "
            f"{model.hf_text_config.architectures}, which would compute equal groups: save the "
            "model with gqa_kernels.convert.save, which names the class"
        )
