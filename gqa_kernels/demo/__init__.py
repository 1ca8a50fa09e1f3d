"""``gqa-kernels demo``: uneven head maps on a real language model, checked and timed."""
