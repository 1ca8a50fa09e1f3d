"""The attention backend of vLLM's CPU platform: ours if the user asked for it, else vLLM's.

vLLM's CPU platform ignores ``--attention-backend`` and looks up ``AttentionBackendEnum.CPU_ATTN``.
``register`` points that member here, and the choice is made each time vLLM looks.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ...models.maps import is_uneven
from .backend import AsymGQABackend
from .names import BACKEND


def __getattr__(name: str) -> Any:
    if name != "ChosenBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = get_current_vllm_config_or_none()
    asked = None if config is None else getattr(config.attention_config.backend, "name", None)
    model = None if config is None else config.model_config
    # A model with uneven maps gets ours, too: it refuses a model class that ignores them.
    if asked == BACKEND or (model is not None and is_uneven(model.hf_text_config)):
        return AsymGQABackend
    module, stock = AttentionBackendEnum.CPU_ATTN.value.rsplit(".", 1)
    return getattr(__import__(module, fromlist=[stock]), stock)
