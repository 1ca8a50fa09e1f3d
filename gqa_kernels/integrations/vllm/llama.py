"""LLaMA models with head maps in their config, as ``gqa_kernels.convert`` writes them, for vLLM."""

from __future__ import annotations

from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from ...head_map import HeadMap
from ...models.maps import KEY_FIELD, VALUE_FIELD, layer_maps
from .backend import AsymGQABackend


class AsymGQAAttention(Attention):
    """vLLM's attention layer over a head map.

    Args:
        head_map: the KV head of each query head.
        others: as ``Attention`` takes them.
    """

    def __init__(self, num_heads: int, head_size: int, scale: float, head_map: HeadMap, **others):
        # The rule that KV heads divide query heads is checked on the constructor's argument alone:
        # the cache's shape and the views of K and V come from the attribute, later.
        super().__init__(
            num_heads, head_size, scale, num_kv_heads=num_heads, attn_backend=AsymGQABackend,
            head_map=head_map, **others,
        )  # fmt: skip
        self.num_kv_heads = head_map.num_kv_heads


class AsymGQALlamaAttention(LlamaAttention):
    """LLaMA's attention with its layer's map."""

    def __init__(
        self,
        config,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int = 8192,
        quant_config=None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config=None,
        prefix: str = "",
        **_: object,
    ):
        nn.Module.__init__(self)
        if get_tensor_model_parallel_world_size() > 1:
            raise NotImplementedError(
                "tensor_parallel_size must be 1 for models with uneven head maps, got "
                f"{get_tensor_model_parallel_world_size()}"
            )
        index = extract_layer_index(prefix)
        if getattr(config, VALUE_FIELD, None) is not None:
            raise NotImplementedError(
                f"config.{VALUE_FIELD} must be None: vLLM's cache holds K and V of a head side by "
                "side, so they can't be grouped apart"
            )
        maps = getattr(config, KEY_FIELD, None)
        if maps is not None:
            num_kv_heads = max(maps[index]) + 1
        head_map, _value_map = layer_maps(config, index, num_heads, num_kv_heads, num_kv_heads)
        self.head_dim = getattr(config, "head_dim", None) or hidden_size // num_heads
        self.q_size, self.kv_size = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.max_position_embeddings = max_position_embeddings
        self.qkv_proj = QKVParallelLinear(
            hidden_size, self.head_dim, num_heads, num_kv_heads, bias=bias,
            quant_config=quant_config, prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            self.q_size, hidden_size, bias=bias_o_proj, quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )  # fmt: skip
        self._init_rotary_emb(config, quant_config=quant_config)
        types = getattr(config, "layer_types", None)
        sliding = types is not None and types[index] == "sliding_attention"
        self.attn = AsymGQAAttention(
            num_heads, self.head_dim, self.head_dim**-0.5, head_map, cache_config=cache_config,
            quant_config=quant_config, prefix=f"{prefix}.attn",
            per_layer_sliding_window=config.sliding_window if sliding else None,
        )  # fmt: skip


class AsymGQALlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config=None):
        super().__init__(vllm_config, prefix, config, attn_layer_type=AsymGQALlamaAttention)


class AsymGQALlamaForCausalLM(LlamaForCausalLM):
    """LLaMA with head maps; registered by :func:`gqa_kernels.integrations.vllm.register`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(
            vllm_config=vllm_config, prefix=prefix, layer_type=AsymGQALlamaDecoderLayer
        )
