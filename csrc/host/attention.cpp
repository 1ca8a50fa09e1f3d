#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include "../cpu/attention.h"
#include "checks.h"

namespace gqa::host {

std::tuple<Tensor, Tensor> attention_forward_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd,
    double dropout_p, const OptionalTensor& dropout_seed) {
  Call call({q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths, scale,
             window_left, window_right, softcap, dropout_p, dropout_seed});
  AttentionParams& params = call.params;

  Tensor out = bshd ? torch::stable::transpose(
                          torch::stable::new_empty(q, {params.batch, params.q_len, params.num_heads,
                                                       params.value_head_dim}),
                          1, 2)
                    : torch::stable::new_empty(
                          q, {params.batch, params.num_heads, params.q_len, params.value_head_dim});
  Tensor lse = torch::stable::new_empty(q, {params.batch, params.num_heads, params.q_len},
                                        ScalarType::Float);
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.out_stride = strides_of(out);

  cpu::attention_forward(params, torch_threads());
  return {out, lse};
}

}  // namespace gqa::host
