"""How many instructions the CPU kernels' inner loops take, from their machine code."""
