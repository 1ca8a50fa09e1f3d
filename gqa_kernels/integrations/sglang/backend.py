"""SGLang's attention backend over :func:`.attention.pooled_attention`."""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from ...models.maps import KEY_FIELD, VALUE_FIELD, layer_maps, stored_maps
from ..engine_layer import Layer
from .attention import Step, page_tables, pooled_attention
from .names import BACKEND

MODES = ("DECODE", "EXTEND", "MIXED", "SPLIT_PREFILL", "IDLE")


class AsymGQABackend(AttentionBackend):
    """Attention backend of a model whose config may hold head maps.

    Args:
        model_runner: SGLang's. Its request table, token pool and model config are used.

        Raises:
            NotImplementedError: the pool is not of MHA tokens, tensor parallelism is used with
                uneven maps, or layers have different numbers of KV heads.
    """

    def __init__(self, model_runner):
        super().__init__()
        self.config = model_runner.model_config.hf_text_config
        self.pool = model_runner.token_to_kv_pool
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.page_size = getattr(model_runner, "page_size", 1) or 1
        self.one = torch.ones((), device=self.req_to_token.device)  # the scale of unscaled fp8
        self.graph_table: Tensor | None = None
        self.graph_lens: Tensor | None = None
        if not isinstance(self.pool, MHATokenToKVPool):
            raise NotImplementedError(
                f"{BACKEND} needs SGLang's MHATokenToKVPool, got {type(self.pool).__name__}; "
                "models with sliding windows use it under --disable-hybrid-swa-memory"
            )
        if getattr(self.pool, "kv_cache_layout", "nhd") != "nhd":
            raise NotImplementedError(
                f"{BACKEND} needs a token pool in layout nhd, got {self.pool.kv_cache_layout}"
            )
        _check_maps(self.config, get_parallel().tp_size)

    def init_forward_metadata(self, forward_batch) -> None:
        """Prepare what the layers of an eager step share."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        _check_mode(forward_batch)
        lens = forward_batch.seq_lens.int()
        longest = forward_batch.seq_lens_cpu
        longest = int((lens if longest is None else longest).max())
        table = page_tables(
            self.req_to_token, forward_batch.req_pool_indices, longest, self.page_size
        )
        if mode.is_decode():
            self.forward_metadata = Step(table, lens, None, 1, self.page_size)
            return
        new = forward_batch.extend_seq_lens
        offsets = torch.nn.functional.pad(new.cumsum(0), (1, 0)).int()
        most = forward_batch.extend_seq_lens_cpu
        most = int(new.max()) if most is None else max(most)
        self.forward_metadata = Step(table, lens, offsets, most, self.page_size)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate the memory that captured kernels read. It is refilled before each replay."""
        pages = -(-self.req_to_token.shape[1] // self.page_size)
        self.graph_table = self.req_to_token.new_zeros(max_bs, pages)
        self.graph_lens = torch.ones(max_bs, dtype=torch.int32, device=self.req_to_token.device)

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False) -> None:
        """Prepare what the layers of a captured decode step share, before capture and each
        replay."""
        if not forward_batch.forward_mode.is_decode_or_idle():
            raise NotImplementedError(
                f"{BACKEND} captures decode steps in CUDA graphs, got "
                f"{forward_batch.forward_mode.name}: run with --cuda-graph-backend-prefill=disabled"
            )
        _check_mode(forward_batch)
        batch = forward_batch.batch_size
        longest = forward_batch.seq_lens_cpu
        longest = self.req_to_token.shape[1] if longest is None else int(longest.max())
        table = page_tables(
            self.req_to_token, forward_batch.req_pool_indices[:batch], longest, self.page_size
        )
        # Pages beyond a length are never used, so entries of earlier steps are harmless there.
        self.graph_table[:batch, : table.shape[1]].copy_(table)
        self.graph_lens[:batch].copy_(forward_batch.seq_lens[:batch])
        self.forward_metadata = Step(
            self.graph_table[:batch], self.graph_lens[:batch], None, 1, self.page_size
        )

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def forward_decode(
        self, q, k, v, layer, forward_batch, save_kv_cache: bool = True, sinks=None, **others
    ) -> Tensor:
        """As :meth:`forward_extend`, with one token per request."""
        return self.forward_extend(
            q, k, v, layer, forward_batch, save_kv_cache, sinks=sinks, **others
        )

    def forward_extend(
        self, q, k, v, layer, forward_batch, save_kv_cache: bool = True, sinks=None, **others
    ) -> Tensor:
        """Store the new keys and values, and attend. Returns ``[tokens, Hq * Dv]``.

        Args:
            q: ``[tokens, Hq * D]``.
            k, v: ``[tokens, Hkv, D or Dv]``, or None if the pool already has them.
            layer: the model's ``RadixAttention``.
            sinks: ``[Hq]``, or None.
        """
        given = sorted(name for name, x in others.items() if x is not None and x is not False)
        if given:
            raise NotImplementedError(f"{BACKEND} does not take {', '.join(given)}")
        this = self._layer(layer, sinks)
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(
                layer, forward_batch.out_cache_loc, k, v, layer.k_scale, layer.v_scale
            )
        k_pool = self.pool.get_key_buffer(layer.layer_id)
        v_pool = self.pool.get_value_buffer(layer.layer_id)
        scales = {}
        if k_pool.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            scales = {
                "k_scale": self.one if layer.k_scale is None else layer.k_scale,
                "v_scale": self.one if layer.v_scale is None else layer.v_scale,
            }
        query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = pooled_attention(this, self.forward_metadata, query, k_pool, v_pool, **scales)
        return out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _layer(self, layer, sinks: Tensor | None) -> Layer:
        """The options of ``layer``."""
        if layer.is_cross_attention:
            raise NotImplementedError(f"{BACKEND} has no cross attention over SGLang's pool")
        if layer.xai_temperature_len > 0:
            raise NotImplementedError(
                f"{BACKEND} has no temperature by length, got {layer.xai_temperature_len}"
            )
        head_map, value_head_map = layer_maps(
            self.config,
            layer.layer_id,
            layer.tp_q_head_num,
            layer.tp_k_head_num,
            layer.tp_v_head_num,
        )
        window = layer.sliding_window_size
        return Layer(
            head_map,
            layer.scaling,
            value_head_map=value_head_map,
            window=None if window is None or window < 0 else window,
            softcap=layer.logit_cap or None,
            causal=layer.attn_type == AttentionType.DECODER,
            sinks=sinks,
        )


def _check_maps(config, tp_size: int) -> None:
    """The maps of a config, checked against what SGLang's models and pool can hold."""
    pairs = stored_maps(config)
    if pairs is None:
        return
    counts = {head_map.num_kv_heads for pair in pairs for head_map in pair}
    if counts != {config.num_key_value_heads}:
        raise NotImplementedError(
            f"config.{KEY_FIELD} and {VALUE_FIELD} must have num_key_value_heads "
            f"({config.num_key_value_heads}) KV heads in every layer with {BACKEND}: SGLang's "
            f"models and token pool have one count, got {sorted(counts)}"
        )
    if tp_size > 1:
        raise NotImplementedError(
            f"tp_size must be 1 for models with head maps and {BACKEND}, got {tp_size}"
        )


def _check_mode(forward_batch) -> None:
    mode = forward_batch.forward_mode.name
    if forward_batch.spec_info is not None or mode not in MODES:
        raise NotImplementedError(
            f"{BACKEND} runs forward modes {', '.join(MODES)} without speculation under SGLang, "
            f"got {mode}{'' if forward_batch.spec_info is None else ' with speculation'}"
        )
