#include <torch/csrc/stable/accelerator.h>

#include "../cuda/attention.h"
#include "attention.h"
#include "call_cuda.h"

namespace gqa::host {
namespace {

std::tuple<Tensor, Tensor> forward(const Inputs& in, const CacheInputs* cache, bool bshd) {
  const int32_t index = in.q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const cuda::Device device = check_cuda_call(in, cache);
  AttentionParams params = params_of(in, cache);
  Outputs outputs = add_outputs(params, in.q, bshd);
  const cuda::Phase phase = cuda::choose_phase(params, device);
  Tensor workspace = workspace_of(in.q, cuda::workspace_bytes(params, phase, device));
  cuda::attention_forward(params, phase, workspace.mutable_data_ptr(), device,
                          current_stream(index));
  return {outputs.out, outputs.lse};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd,
    double dropout_p, const OptionalTensor& dropout_seed) {
  return forward({q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths,
                  scale, window_left, window_right, softcap, dropout_p, dropout_seed},
                 nullptr, bshd);
}

std::tuple<Tensor, Tensor> cache_attention_forward_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const Tensor& kv_lengths,
    const OptionalTensor& page_table, const OptionalTensor& kv_begin,
    const OptionalTensor& q_offsets, int64_t max_q_len, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale, const OptionalTensor& k_zero, const OptionalTensor& v_zero,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd, bool) {
  const OptionalTensor lengths = kv_lengths, no_seed;
  const CacheInputs cache{page_table, kv_begin, q_offsets, max_q_len,
                          k_scale,    v_scale,  k_zero,    v_zero};
  return forward({q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, lengths, scale,
                  window_left, window_right, softcap, 0.0, no_seed},
                 &cache, bshd);
}

}  // namespace gqa::host
