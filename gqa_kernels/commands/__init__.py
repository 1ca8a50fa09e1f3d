"""Subcommands of ``gqa-kernels``, one a file: each has ``add(commands)``, which adds its parser."""
