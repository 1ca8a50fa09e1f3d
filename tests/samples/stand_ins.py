"""A tiny model and a tokenizer that stand in for SmolLM2."""

from gqa_kernels.samples.smollm2 import LoadedModel
from tests.tiny_models import tiny


class ByteTokenizer:
    """One token per byte of ASCII."""

    def encode(self, text, add_special_tokens=False):
        return [byte % 128 for byte in text.encode()]

    def decode(self, ids):
        return bytes(ids).decode("ascii")


def load_tiny():
    model = tiny(num_heads=9, num_kv_heads=3, vocab_size=128)
    return LoadedModel("tiny", model, ByteTokenizer())
