"""vLLM's three classes of an attention backend: backend, metadata builder, implementation."""

from __future__ import annotations

from dataclasses import replace
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
from vllm.v1.kv_cache_interface import AttentionSpec

from ...head_map import HeadMap
from ..engine_layer import Layer
from . import equal_groups
from .attention import Batch, cached_attention
from .names import BACKEND
from .pages import PER_TOKEN_HEAD, Pages, slot_bytes

FP8_FORMATS = ("fp8", "fp8_e4m3", "fp8_e5m2")


class AsymGQABackend(AttentionBackend):
    """Paged attention by ``gqa_kernels``; what it can do, as vLLM asks."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        "auto", "float16", "bfloat16", *FP8_FORMATS, *PER_TOKEN_HEAD,
    ]  # fmt: skip
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
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Add room for the scales that lie behind K and V of a token and head."""
        name = spec.kv_quant_mode.name.lower()
        if spec.state_content_bytes is not None or name not in PER_TOKEN_HEAD:
            return spec
        dims = (spec.head_size, spec.head_size_v)
        return replace(spec, state_content_bytes=slot_bytes(name, spec.dtype, (1, 1), dims))

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
    """Copies nothing: kernels read lengths and page tables where they lie."""

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
    """Attention of one layer, with the even map of ordinary GQA until :meth:`use_maps`.

    Raises:
        NotImplementedError: the model being built has uneven maps, and its class ignores them.
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
        head_size_v: int | None = None,
    ):
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(
                f"attn_type must be 'decoder' with {BACKEND}, got {attn_type!r}"
            )
        # Our model classes hide the maps while vLLM builds the model, and set them afterwards.
        equal_groups.refuse(get_current_vllm_config().model_config)
        self.num_heads = num_heads
        self.head_size = head_size
        self.head_size_v = head_size if head_size_v is None else head_size_v
        self.scale = scale
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.layer = Layer(
            head_map=HeadMap.uniform(num_heads, num_kv_heads),
            scale=scale,
            window=None if sliding_window is None else sliding_window - 1,
            softcap=logits_soft_cap or None,
            alibi_slopes=slopes,
            sinks=sinks,
        )
        self._lay_out((num_kv_heads, num_kv_heads))

    def use_maps(self, key_map: HeadMap, value_map: HeadMap, stored: tuple[int, int]) -> None:
        """Attend over these maps.

        Args:
            stored: heads of K and of V in a cell of the cache, at least the maps'.
        """
        self.num_heads = key_map.num_heads
        self.layer = replace(
            self.layer, head_map=key_map, value_head_map=None if value_map == key_map else value_map
        )
        self._lay_out(stored)

    def _lay_out(self, stored: tuple[int, int]) -> None:
        format = PER_TOKEN_HEAD.get(self.kv_cache_dtype)
        storage = None if format is None else format.storage
        self.scaled = self.kv_cache_dtype in FP8_FORMATS
        if self.scaled:
            e5m2 = self.kv_cache_dtype == "fp8_e5m2"
            storage = torch.float8_e5m2 if e5m2 else current_platform.fp8_dtype()
        self.num_kv_heads = self.layer.head_map.num_kv_heads
        self.pages = Pages(stored, (self.head_size, self.head_size_v), storage, format)

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
        output[tokens] = cached_attention(
            self.layer,
            self.pages,
            attn_metadata,
            query[tokens],
            None if shared or key is None else key[tokens],
            None if shared or value is None else value[tokens],
            kv_cache,
            scales={"k_scale": layer._k_scale, "v_scale": layer._v_scale} if self.scaled else None,
        )
        return output
