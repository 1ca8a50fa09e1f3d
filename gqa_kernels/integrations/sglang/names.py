"""Names under which SGLang knows what this package registers."""

OLDEST = "0.5.23"  # first release tested
BACKEND = "asym_gqa"
