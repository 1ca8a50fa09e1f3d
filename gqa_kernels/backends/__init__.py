"""Implementations of asymmetric grouped-query attention, and the choice among them."""
