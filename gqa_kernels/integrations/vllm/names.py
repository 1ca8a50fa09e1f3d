"""Names under which vLLM knows what this package registers."""

from ...models.maps import ARCHITECTURE_PREFIX

OLDEST = "0.32"  # first release that ran it
BACKEND = "ASYM_GQA"
# vLLM's own model classes whose models may have head maps.
STOCK = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GptOssForCausalLM",
    "OPTForCausalLM",
    "GPT2LMHeadModel",
)
ARCHITECTURES = tuple(ARCHITECTURE_PREFIX + name for name in STOCK)
# Fields of a config with the width of the feed-forward layers.
FEED_FORWARD_SIZES = ("intermediate_size", "ffn_dim", "n_inner")
