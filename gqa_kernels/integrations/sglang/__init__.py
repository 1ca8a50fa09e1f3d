"""SGLang: the attention backend ``asym_gqa``.

Installed beside SGLang, the package registers itself through the entry point
``sglang.srt.plugins``; elsewhere call :func:`register` once before the server's arguments are
parsed. Then::

    python -m sglang.launch_server --model-path MODEL --attention-backend asym_gqa

MODEL is an even model, or a converted LLaMA, Mistral or Qwen checkpoint with one count of KV heads
in all layers: its maps are read from its config (``kv_head_map``, ``value_head_map``), and SGLang's
own model classes load it. SGLang's other backends must not serve such a checkpoint: they would
compute equal groups, without an error.
"""

from __future__ import annotations

OLDEST = "0.5.23"  # first release tested
BACKEND = "asym_gqa"


def register() -> None:
    """Make the backend known to SGLang; more than one call does no harm.

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


def _create(model_runner):
    """What SGLang calls for a backend of that name."""
    from .backend import AsymGQABackend

    return AsymGQABackend(model_runner)
