"""vLLM's attention layer over head maps: what it stores, and the heads that its kernel reads."""

from __future__ import annotations

from dataclasses import replace

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheSpec

from .pages import slot_bytes
from .ranks import Heads


class UnevenAttention(Attention):
    """An attention layer with a map for K and one for V; made by :meth:`convert`."""

    heads: Heads

    @classmethod
    def convert(cls, attention: Attention, heads: Heads, room: int) -> None:
        """Give a layer that vLLM built with one KV head its maps.

        Args:
            room: heads of the keys and values that the model passes.
        """
        attention.__class__ = cls
        attention.heads = heads
        attention.num_heads, attention.num_kv_heads = heads.counts[0], room
        attention.impl.use_maps(heads.key_map, heads.value_map, heads.stored)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = super().get_kv_cache_spec(vllm_config)
        if spec is None:
            return None
        k_heads, v_heads = self.heads.stored
        if k_heads == v_heads:
            return replace(spec, num_kv_heads=k_heads)
        # vLLM has one count of heads for K and V: a token becomes one head, as wide as all of them.
        return replace(
            spec,
            num_kv_heads=1,
            head_size=k_heads * self.head_size,
            head_size_v=v_heads * self.head_size_v,
            state_content_bytes=slot_bytes(
                self.kv_cache_dtype, spec.dtype, (k_heads, v_heads),
                (self.head_size, self.head_size_v),
            ),
        )  # fmt: skip
