"""Measurements that have no suite of contestants. Each is a command of its own."""
