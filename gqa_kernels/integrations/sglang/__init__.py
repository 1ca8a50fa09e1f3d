"""SGLang: the attention backend ``asym_gqa``.

If it is installed in SGLang's environment, the package registers itself through the entry point
``sglang.srt.plugins``. Otherwise call :func:`register` once before the server's arguments are
parsed. Then::

    python -m sglang.launch_server --model-path MODEL --attention-backend asym_gqa

MODEL is an even model, or a converted LLaMA, Mistral or Qwen checkpoint with one count of KV heads
in all layers. Its maps are read from its config (``kv_head_map``, ``value_head_map``). If
``gqa_kernels.convert.save`` wrote the checkpoint, its config names a model class of :mod:`.models`,
which refuses SGLang's other backends: they would compute equal groups, without an error.
"""

from __future__ import annotations

import os
import warnings

from .names import BACKEND, OLDEST

__all__ = ["BACKEND", "OLDEST", "plugin", "register"]

# SGLang imports models from the package that this variable names, also in processes that it starts.
MODELS_VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"
MODELS = f"{__name__}.models"


def register() -> None:
    """Register the backend and the model classes with SGLang. Calling it again is harmless.

    Raises:
        ImportError: SGLang is missing or too old.
    """
    try:
        from sglang.srt.layers.attention.attention_registry import (
            ATTENTION_BACKENDS,
            register_attention_backend,
        )
        from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
        from sglang.srt.server_args import (
            ATTENTION_BACKEND_CHOICES,
            add_attention_backend_choices,
        )
    except ImportError as error:
        raise ImportError(
            f"gqa_kernels.integrations.sglang needs sglang >= {OLDEST} "
            f"(pip install 'sglang>={OLDEST}'): {error}"
        ) from error
    if not hasattr(AttentionBackend, "init_forward_metadata_out_graph"):
        raise ImportError(
            f"gqa_kernels.integrations.sglang needs sglang >= {OLDEST}: this one has another "
            "contract for CUDA graphs"
        )
    if BACKEND not in ATTENTION_BACKENDS:
        register_attention_backend(BACKEND)(_create)
    if BACKEND not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([BACKEND])
    if os.environ.setdefault(MODELS_VARIABLE, MODELS) != MODELS:
        warnings.warn(
            f"{MODELS_VARIABLE} is {os.environ[MODELS_VARIABLE]!r}, so SGLang can't load models "
            f"with uneven head maps: unset it, or import {MODELS}.uneven in that package",
            stacklevel=2,
        )


def plugin() -> None:
    """The entry point: :func:`register`, with a warning instead of any error.

    An error here would stop SGLang for every model.
    """
    try:
        register()
    except Exception as error:
        warnings.warn(f"gqa_kernels is not registered with SGLang: {error}", stacklevel=2)


def _create(model_runner):
    """The function that SGLang calls to create the backend."""
    from .backend import AsymGQABackend

    return AsymGQABackend(model_runner)
