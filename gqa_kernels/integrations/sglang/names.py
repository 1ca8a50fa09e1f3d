"""Names that this package registers with SGLang."""

OLDEST = "0.5.23"  # first release tested
BACKEND = "asym_gqa"
