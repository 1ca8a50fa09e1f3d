"""vLLM's attention layer over head maps: what it stores, and the heads that its kernel reads."""

from __future__ import annotations

from dataclasses import replace

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheSpec

from ...head_map import HeadMap
from .pages import slot_bytes


class UnevenAttention(Attention):
    """An attention layer with a map for K and one for V; made by :meth:`convert`."""

    key_map: HeadMap
    value_map: HeadMap

    @classmethod
    def convert(cls, attention: Attention, key_map: HeadMap, value_map: HeadMap, room: int) -> None:
        """Give a layer that vLLM built with one KV head its maps.

        Args:
            room: heads of the keys and values that the model passes.
        """
        attention.__class__ = cls
        attention.key_map, attention.value_map = key_map, value_map
        attention.num_kv_heads = room
        attention.impl.use_maps(key_map, value_map)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = super().get_kv_cache_spec(vllm_config)
        if spec is None:
            return None
        k_heads, v_heads = self.key_map.num_kv_heads, self.value_map.num_kv_heads
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
