"""vLLM's three classes of an attention backend: backend, metadata builder, implementation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from ...head_map import HeadMap
from ...models.maps import KEY_FIELD, is_uneven
from ..engine_layer import Layer
from .attention import Batch, cached_attention
from .names import BACKEND

FP8_FORMATS = ("fp8", "fp8_e4m3", "fp8_e5m2")


class AsymGQABackend(AttentionBackend):
    """Paged attention by ``gqa_kernels``; what it can do, as vLLM asks."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", *FP8_FORMATS]
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[AsymGQAImpl]:
        return AsymGQAImpl

    @staticmethod
    def get_builder_cls() -> type[AsymGQAMetadataBuilder]:
        return AsymGQAMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 1 <= head_size <= 256

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True


class AsymGQAMetadataBuilder(AttentionMetadataBuilder[Batch]):
    """Nothing is planned ahead: kernels read lengths and page tables where they lie."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Batch:
        common = common_attn_metadata
        if isinstance(common.causal, Tensor):
            raise NotImplementedError(
                f"causal must be one bool for the whole batch with {BACKEND}, got a Tensor"
            )
        query_lens = common.query_start_loc.diff()
        return Batch(
            num_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            # A padding request has no tokens, and no length that means anything.
            old_lens=(common.seq_lens - query_lens).clamp(min=0),
            block_table=common.block_table_tensor,
            causal=bool(common.causal),
        )


class AsymGQAImpl(AttentionImpl[Batch]):
    """Attention of one layer.

    Args:
        head_map: the KV head of each query head; default the even map of ordinary GQA. vLLM passes
            it on from the model class.

    Raises:
        NotImplementedError: the model has uneven maps, and its class passes none.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        head_map: HeadMap | None = None,
        head_size_v: int | None = None,
    ):
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(
                f"attn_type must be 'decoder' with {BACKEND}, got {attn_type!r}"
            )
        if head_map is None:
            _refuse_equal_groups()
            head_map = HeadMap.uniform(num_heads, num_kv_heads)
        if head_map.num_heads != num_heads:
            raise ValueError(f"head_map must have {num_heads} entries, got {head_map.num_heads}")
        self.num_heads = num_heads
        self.num_kv_heads = head_map.num_kv_heads
        self.head_size = head_size
        self.scale = scale
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.fp8 = kv_cache_dtype in FP8_FORMATS
        slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.layer = Layer(
            head_map=head_map,
            scale=scale,
            window=None if sliding_window is None else sliding_window - 1,
            softcap=logits_soft_cap or None,
            alibi_slopes=slopes,
            sinks=sinks,
        )

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the attention of a step into ``output`` ``[tokens, Hq, Dv]``.

        Args:
            layer: the attention layer; its ``_k_scale`` and ``_v_scale`` scale an fp8 cache.
            query, key, value, kv_cache: as :func:`.attention.cached_attention` takes them.
            attn_metadata: what the builder made; None in vLLM's memory profiling.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"{BACKEND} does not quantise its output")
        if attn_metadata is None:
            return output.fill_(0)
        tokens = slice(attn_metadata.num_tokens)
        shared = self.kv_sharing_target_layer_name is not None  # another layer's cache: read only
        quantised = {}
        if self.fp8:
            e5m2 = self.kv_cache_dtype == "fp8_e5m2"
            quantised = {
                "storage": torch.float8_e5m2 if e5m2 else current_platform.fp8_dtype(),
                "k_scale": layer._k_scale,
                "v_scale": layer._v_scale,
            }
        output[tokens] = cached_attention(
            self.layer,
            attn_metadata,
            query[tokens],
            None if shared or key is None else key[tokens],
            None if shared or value is None else value[tokens],
            kv_cache,
            **quantised,
        )
        return output


def _refuse_equal_groups() -> None:
    """Raise NotImplementedError if the model being built has uneven maps."""
    model = get_current_vllm_config().model_config
    if model is not None and is_uneven(model.hf_text_config):
        raise NotImplementedError(
            f"a model with config.{KEY_FIELD} must be loaded by a model class that reads it, got "
            f"{model.hf_text_config.architectures}, which would compute equal groups: save the "
            "model with gqa_kernels.convert.save, which names the class"
        )
