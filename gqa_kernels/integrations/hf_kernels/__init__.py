"""Hugging Face ``kernels``: writes the package as a kernel repository that ``get_kernel`` loads.

::

    python -m gqa_kernels.integrations.hf_kernels FOLDER

writes one.
"""

from .repository import BACKENDS, build

__all__ = ["BACKENDS", "build"]
