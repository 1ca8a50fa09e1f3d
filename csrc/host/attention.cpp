#include "attention.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "../cpu/forward/attention.h"
#include "call.h"

namespace gqa::host {
namespace {

std::tuple<Tensor, Tensor> run(Call& call, const Tensor& q, bool bshd, bool lse_wanted) {
  Outputs outputs = add_outputs(call.params, q, bshd);
  cpu::attention_forward(call.params, torch_threads(), lse_wanted);
  return {outputs.out, outputs.lse};
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
  return run(call, q, bshd, true);
}

Tensor plain_attention_forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& head_map, int64_t num_kv_heads,
                                   std::optional<double> scale, bool causal, bool bshd) {
  const OptionalTensor none;
  Call call({q, k, v, head_map, none, none, none, none, none, 1.0, -1, causal ? 0 : -1, 0.0, 0.0,
             none});
  AttentionParams& params = call.params;
  STD_TORCH_CHECK(params.num_k_heads == num_kv_heads && params.num_v_heads == num_kv_heads,
                  "k and v must have ", num_kv_heads, " heads, got ", params.num_k_heads, " and ",
                  params.num_v_heads);
  params.scale = static_cast<float>(scale ? *scale : std::pow(params.head_dim, -0.5));

  const int64_t heads = params.num_heads, tokens = params.q_len, dim = params.value_head_dim;
  const int64_t rows = std::max<int64_t>(tokens, 1);  // strides of an empty tensor as torch's
  const Tensor out = empty_beside(
      q, q.scalar_type(), {params.batch, heads, tokens, dim},
      {heads * rows * dim, bshd ? dim : rows * dim, bshd ? heads * dim : dim, 1});
  const std::unique_ptr<float[]> lse(new float[params.batch * heads * tokens]);
  params.out = out.mutable_data_ptr();
  params.out_stride = strides_of(out);
  params.lse = lse.get();
  cpu::attention_forward(params, torch_threads(), false);
  return out;
}

std::tuple<Tensor, Tensor> cache_attention_forward_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const Tensor& kv_lengths,
    const OptionalTensor& page_table, const OptionalTensor& kv_begin,
    const OptionalTensor& q_offsets, int64_t max_q_len, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale, const OptionalTensor& k_zero, const OptionalTensor& v_zero,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd,
    bool lse_wanted) {
  const OptionalTensor lengths = kv_lengths, no_seed;
  const CacheInputs cache{page_table, kv_begin, q_offsets, max_q_len,
                          k_scale,    v_scale,  k_zero,    v_zero};
  Call call({q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, lengths, scale,
             window_left, window_right, softcap, 0.0, no_seed},
            &cache);
  return run(call, q, bshd, lse_wanted);
}

}  // namespace gqa::host
