"""The Triton kernels, and the NamedTuples that they take (arguments.py)."""
