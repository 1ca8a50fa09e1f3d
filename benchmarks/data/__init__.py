"""Models, head maps, cases and suites, as data."""
