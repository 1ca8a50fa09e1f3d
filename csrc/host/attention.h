// The forward ops that the bindings register. Their arguments are listed once for all devices.
#pragma once

#include <tuple>

#include "inputs.h"

namespace gqa::host {

// Computes a call's attention on one device. With bshd, out's memory is [B, Sq, Hq, Dv]. The second
// form returns no LSE, so it may round the sum as it rounds out.
using Forward = std::tuple<Tensor, Tensor>(const Inputs& in, bool bshd);
using ForwardOutput = Tensor(const Inputs& in, bool bshd);

Forward attention_forward_cpu, attention_forward_cuda;
ForwardOutput attention_output_cpu, attention_output_cuda;

// As above, with the further results of AuxRequest (gqa_kernels/call/auxiliary.py): max_scores [B,
// Hq] and key_scores [B, Hk, Sk], fp32. Each is empty if not requested.
using ForwardAuxiliary = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Inputs& in, bool bshd,
                                                                    bool max_scores,
                                                                    int64_t key_scores);
ForwardAuxiliary attention_auxiliary_cpu;

// Attention into the caller's memory: out [B, Hq, Sq, Dv] in q's dtype, whose own strides count, and
// lse, fp32 [B, Hq, Sq], contiguous.
using ForwardInto = void(const Inputs& in, bool bshd, OptionalTensor out, OptionalTensor lse);
ForwardInto attention_into_cpu;

// The arguments of attention_forward, in the order of its schema. More: those of further results.
template <auto* forward, class... More>
auto attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
               std::optional<double> scale, int64_t window_left, int64_t window_right,
               double softcap, bool batch_invariant, bool bshd, const OptionalTensor& kv_lengths,
               const OptionalTensor& page_table, const OptionalTensor& kv_begin,
               const OptionalTensor& sinks, const OptionalTensor& value_head_map,
               const OptionalTensor& alibi_slopes, const OptionalTensor& attn_mask,
               const OptionalTensor& q_offsets, int64_t max_q_len, int64_t max_kv_len,
               const OptionalTensor& k_scale, const OptionalTensor& v_scale,
               const OptionalTensor& k_zero, const OptionalTensor& v_zero, double dropout_p,
               const OptionalTensor& dropout_seed, const OptionalTensor& key_ranges, More... more) {
  return forward({q,
                  k,
                  v,
                  head_map,
                  value_head_map,
                  alibi_slopes,
                  sinks,
                  attn_mask,
                  kv_lengths,
                  page_table,
                  kv_begin,
                  q_offsets,
                  max_q_len,
                  max_kv_len,
                  k_scale,
                  v_scale,
                  k_zero,
                  v_zero,
                  scale,
                  window_left,
                  window_right,
                  softcap,
                  batch_invariant,
                  dropout_p,
                  dropout_seed,
                  key_ranges},
                 bshd, more...);
}

// The same for attention_output, which has few arguments: the others take their defaults.
template <ForwardOutput* forward>
Tensor attention_output(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
                        std::optional<double> scale, int64_t window_left, int64_t window_right,
                        double softcap, bool bshd, const OptionalTensor& kv_lengths,
                        const OptionalTensor& page_table, const OptionalTensor& sinks) {
  const OptionalTensor none;
  return attention<forward>(q, k, v, head_map, scale, window_left, window_right, softcap, false,
                            bshd, kv_lengths, page_table, none, sinks, none, none, none, none, 0, 0,
                            none, none, none, none, 0.0, none, none);
}

// The same for attention_dense_output, which has even fewer arguments.
template <ForwardOutput* forward>
Tensor attention_dense_output(const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& head_map, std::optional<double> scale,
                              int64_t window_right, bool bshd) {
  const OptionalTensor none;
  return attention_output<forward>(q, k, v, head_map, scale, -1, window_right, 0.0, bshd, none,
                                   none, none);
}

}  // namespace gqa::host
