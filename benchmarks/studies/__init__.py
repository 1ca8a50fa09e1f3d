"""Measurements that are no race: each is a command of its own."""
