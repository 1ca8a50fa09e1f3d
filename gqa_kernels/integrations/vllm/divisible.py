"""vLLM's check of head counts against ranks, which our model classes don't need.

vLLM refuses a model whose number of query heads the ranks of tensor parallelism don't divide. It
reads the number from a summary of the config, and for models on our backend nothing else does. So a
hook, which vLLM calls for each architecture before the check, rounds it up in that summary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from ...models.maps import stock_architecture


def register(architecture: str) -> None:
    """Enter the hook of one of our architectures, which does what that of vLLM's own class does,
    too."""
    if architecture in MODELS_CONFIG_MAP:
        return
    stock = MODELS_CONFIG_MAP.get(stock_architecture(architecture), VerifyAndUpdateConfig)

    class Divisible(stock):
        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            super().verify_and_update_config(vllm_config)
            ranks = vllm_config.parallel_config.tensor_parallel_size
            model = vllm_config.model_config
            heads = model.model_arch_config.total_num_attention_heads
            model.model_arch_config = replace(
                model.model_arch_config, total_num_attention_heads=-(-heads // ranks) * ranks
            )

    MODELS_CONFIG_MAP[architecture] = Divisible
