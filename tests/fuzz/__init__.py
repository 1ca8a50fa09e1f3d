"""A seeded fuzzer of every public function: ``python -m tests.fuzz --help``."""
