"""Calls and caches that tests of several backends share, as data."""
