"""vLLM: the attention backend ``ASYM_GQA`` and model classes that read head maps.

Installed beside vLLM, the package registers itself through the entry point
``vllm.general_plugins``; elsewhere call :func:`register` once before a model is built. Then::

    vllm serve <even model> --attention-backend ASYM_GQA
    vllm serve <converted model>

The first runs any model that vLLM's own backends run. The second runs a checkpoint of a family in
``ARCHITECTURES`` that ``gqa_kernels.convert.save`` wrote: its config names a model class that this
package registers. vLLM requires the number of query heads to be a multiple of the number of KV
heads. :mod:`.models` says how its model classes work around that check.
"""

from __future__ import annotations

import copyreg
import warnings
from typing import Any

from .names import ARCHITECTURES, BACKEND, OLDEST

__all__ = ["ARCHITECTURES", "BACKEND", "OLDEST", "plugin", "register"]


def register() -> None:
    """Make the backend and the model classes known to vLLM; more than one call does no harm.

    Raises:
        ImportError: vLLM is missing or too old.
    """
    try:
        from vllm.model_executor.models.registry import ModelRegistry
        from vllm.platforms import current_platform
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
    # Engine processes are spawned. They unpickle their config before plug-ins are loaded, when the
    # enumeration does not have our name yet: so members are pickled as a call that registers it.
    copyreg.pickle(AttentionBackendEnum, _reduce)
    if current_platform.is_cpu():
        # On CPUs vLLM always takes the class behind this member, whatever the user asks for.
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.cpu.ChosenBackend")
    from . import divisible, equal_groups

    for name in ARCHITECTURES:
        divisible.register(name)
        ModelRegistry.register_model(name, f"{__name__}.models:{name}")
    for name in {*ModelRegistry.get_supported_archs()} - {*ARCHITECTURES}:
        equal_groups.register(name)


def plugin() -> None:
    """The entry point: :func:`register`, with a warning in place of any error.

    vLLM does not catch what an entry point raises. An error here would stop it for every model, on
    every machine on which this package is installed.
    """
    try:
        register()
    except Exception as error:
        warnings.warn(f"gqa_kernels is not registered with vLLM: {error}", stacklevel=2)


def backend_named(name: str) -> Any:
    """vLLM's ``AttentionBackendEnum[name]``, registered if need be."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name not in AttentionBackendEnum.__members__:
        register()
    return AttentionBackendEnum[name]


def _reduce(member: Any) -> tuple[Any, tuple[str]]:
    return backend_named, (member.name,)
