"""Names under which vLLM knows what this package registers."""

OLDEST = "0.32"  # first release that ran it
BACKEND = "ASYM_GQA"
ARCHITECTURE = "AsymGQALlamaForCausalLM"
