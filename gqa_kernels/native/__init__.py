"""The compiled kernels as Python sees them: their sources, building, finding and loading them.

``setup.py`` imports ``sources``, ``cuda_build``, ``env`` and, where there is a torch, ``compiler``
from this folder without the package: they and this file import nothing above this folder, and all
but ``compiler`` no torch.
"""
