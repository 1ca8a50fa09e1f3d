"""The compiled kernels as Python sees them: their sources, how they are built, found and loaded.

``setup.py`` imports ``sources``, ``cuda_build`` and ``env`` from this folder without the package,
and ``compiler`` as well if torch is installed. So these files import nothing above this folder, and
only ``compiler`` imports torch.
"""
