// Op schemas and which function implements each on which device; nothing else. Built on Torch's
// stable ABI: one binary serves every Torch from 2.10 on.
#include <torch/csrc/stable/library.h>

#include "host/append.h"
#include "host/attention.h"
#include "host/backward.h"
#include "host/slots.h"

// Tensors as AttentionInputs (gqa_kernels/inputs.py) normalises them; head maps int32. bshd: out's
// memory is [B, Sq, Hq, Dv]. dropout_seed: int64 [2], seed and offset, see core/dropout.h. Returns
// out [B, Hq, Sq, Dv] and the LSE, fp32 [B, Hq, Sq].
STABLE_TORCH_LIBRARY(gqa_kernels, library) {
  library.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor head_map, Tensor? value_head_map, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? attn_mask, Tensor? kv_lengths, float scale, "
      "int window_left, int window_right, float softcap, bool bshd, float dropout_p=0.0, "
      "Tensor? dropout_seed=None) -> (Tensor out, Tensor lse)");
  // The same of a call without options, on the CPU: host/attention.h says why. Without a gradient.
  library.def(
      "plain_attention_forward(Tensor q, Tensor k, Tensor v, Tensor head_map, int num_kv_heads, "
      "float? scale, bool causal, bool bshd) -> Tensor");
  // out and lse: the forward's. dq, dk and dv have the dtype and shape of q, k and v; dslopes is
  // fp32 [B, Hq], dsinks fp32 [Hq], both empty where not needed.
  library.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor head_map, Tensor? value_head_map, Tensor? alibi_slopes, Tensor? sinks, "
      "Tensor? attn_mask, Tensor? kv_lengths, float scale, int window_left, int window_right, "
      "float softcap, float dropout_p, Tensor? dropout_seed, bool need_slopes, bool need_sinks) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dslopes, Tensor dsinks)");
  // The same of packed sequences, on CUDA devices: q, out and dout are [1, Hq, tokens, D], dlse and
  // lse likewise; k and v, and where their sequences lie, as cache_attention_forward has them. dk
  // and dv have a batch of 1.
  library.def(
      "packed_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor head_map, Tensor? value_head_map, Tensor? alibi_slopes, "
      "Tensor? sinks, Tensor kv_lengths, Tensor kv_begin, Tensor q_offsets, int max_q_len, "
      "int max_kv_len, float scale, int window_left, int window_right, float softcap, "
      "bool need_slopes, bool need_sinks) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dslopes, Tensor dsinks)");

  // K and V in pages of a cache: AttentionParams (core/params.h) says how. kv_lengths [B, Hk]; with
  // q_offsets, q is [1, Hq, tokens, D]. Returns out and the LSE in q's shape. lse_wanted: false
  // where the LSE won't be read, which then may be rounded as the output is.
  library.def(
      "cache_attention_forward(Tensor q, Tensor k, Tensor v, Tensor head_map, "
      "Tensor? value_head_map, Tensor? alibi_slopes, Tensor? sinks, Tensor? attn_mask, "
      "Tensor kv_lengths, Tensor? page_table, Tensor? kv_begin, Tensor? q_offsets, int max_q_len, "
      "Tensor? k_scale, Tensor? v_scale, Tensor? k_zero, Tensor? v_zero, float scale, "
      "int window_left, int window_right, float softcap, bool bshd, bool lse_wanted=True) "
      "-> (Tensor out, Tensor lse)");

  // Whether every key of a cache on the CPU, and each new token behind them, has a slot inside its
  // sequence's capacity, in a page that is one. Looks at values, so it has no fake kernel.
  library.def(
      "cache_slots_exist(Tensor kv_lengths, Tensor? page_table, Tensor? kv_begin, "
      "Tensor? new_offsets, int new_tokens, int num_pages, int page_size) -> bool");

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
  library.impl("cache_attention_forward", TORCH_BOX(&gqa::host::cache_attention_forward_cpu));
  library.impl("plain_attention_forward", TORCH_BOX(&gqa::host::plain_attention_forward_cpu));
  library.impl("cache_slots_exist", TORCH_BOX(&gqa::host::cache_slots_exist_cpu));
  library.impl("cache_append", TORCH_BOX(&gqa::host::cache_append_cpu));
  library.impl("attention_backward", TORCH_BOX(&gqa::host::attention_backward_cpu));
}
