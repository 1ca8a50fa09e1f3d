"""Gate, timing, the machine's limits, and the roofline."""
