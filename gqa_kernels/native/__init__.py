"""The compiled kernels as Python sees them: their sources, building, finding and loading them.

``setup.py`` imports ``sources``, ``cuda_build`` and ``env`` from this folder without the package,
so these three and this file import neither torch nor the package.
"""
