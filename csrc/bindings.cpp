// Op schemas and which function implements each on which device; nothing else. Built on Torch's
// stable ABI: one binary serves every Torch from 2.10 on.
#include <torch/csrc/stable/library.h>

#include "host/attention.h"

// Tensors as AttentionInputs (gqa_kernels/inputs.py) normalises them; head maps int32. bshd: out's
// memory is [B, Sq, Hq, Dv]. Returns out [B, Hq, Sq, Dv] and the LSE, fp32 [B, Hq, Sq].
STABLE_TORCH_LIBRARY(gqa_kernels, library) {
  library.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor head_map, Tensor? value_head_map, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? attn_mask, Tensor? kv_lengths, float scale, "
      "int window_left, int window_right, float softcap, bool bshd) -> (Tensor out, Tensor lse)");

  // K and V in pages of a cache: AttentionParams (core/params.h) says how. kv_lengths [B, Hk]; with
  // q_offsets, q is [1, Hq, tokens, D]. Returns out and the LSE in q's shape.
  library.def(
      "cache_attention_forward(Tensor q, Tensor k, Tensor v, Tensor head_map, "
      "Tensor? value_head_map, Tensor? alibi_slopes, Tensor? sinks, Tensor? attn_mask, "
      "Tensor kv_lengths, Tensor? page_table, Tensor? kv_begin, Tensor? q_offsets, int max_q_len, "
      "Tensor? k_scale, Tensor? v_scale, Tensor? k_zero, Tensor? v_zero, float scale, "
      "int window_left, int window_right, float softcap, bool bshd) -> (Tensor out, Tensor lse)");

  // Writes new tokens behind the kv_lengths [B, Hk] there are, rotated and quantised where asked
  // for, and returns q rotated.
  library.def(
      "cache_append(Tensor? q, Tensor k_new, Tensor v_new, Tensor(a!) k, Tensor(b!) v, "
      "Tensor kv_lengths, Tensor? page_table, Tensor? kv_begin, Tensor? new_offsets, "
      "Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor(e!)? k_zero, Tensor(f!)? v_zero, "
      "Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved) -> Tensor q_rotated");
}

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, library) {
  library.impl("attention_forward", TORCH_BOX(&gqa::host::attention_forward_cpu));
}
