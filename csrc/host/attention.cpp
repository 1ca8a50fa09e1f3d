#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include "../cpu/attention.h"
#include "checks.h"

namespace gqa::host {
namespace {

// out and lse of a call, in memory of their own.
std::tuple<Tensor, Tensor> run_forward(Call& call, const Tensor& q, bool bshd) {
  AttentionParams& params = call.params;
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2);
  const int64_t dims = params.value_head_dim;
  Tensor out = bshd ? torch::stable::transpose(
                          torch::stable::new_empty(q, {batch, tokens, heads, dims}), 1, 2)
                    : torch::stable::new_empty(q, {batch, heads, tokens, dims});
  Tensor lse = torch::stable::new_empty(q, {batch, heads, tokens}, ScalarType::Float);
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.out_stride = strides_of(out);
  cpu::attention_forward(params, torch_threads());
  return {out, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd,
    double dropout_p, const OptionalTensor& dropout_seed) {
  Call call({q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths, scale,
             window_left, window_right, softcap, dropout_p, dropout_seed});
  return run_forward(call, q, bshd);
}

std::tuple<Tensor, Tensor> cache_attention_forward_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const Tensor& kv_lengths,
    const OptionalTensor& page_table, const OptionalTensor& kv_begin,
    const OptionalTensor& q_offsets, int64_t, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale, const OptionalTensor& k_zero, const OptionalTensor& v_zero,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd) {
  const OptionalTensor lengths = kv_lengths, no_seed;
  const CacheArguments cache{page_table, kv_begin, q_offsets, k_scale, v_scale, k_zero, v_zero};
  Call call({q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, lengths, scale,
             window_left, window_right, softcap, 0.0, no_seed, &cache});
  return run_forward(call, q, bshd);
}

}  // namespace gqa::host
