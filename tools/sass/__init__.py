"""Reads the machine code (SASS) of CUDA kernels: loops, instruction counts, and a speed model."""
