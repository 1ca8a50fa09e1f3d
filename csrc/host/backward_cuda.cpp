#include <torch/csrc/stable/accelerator.h>

#include "../cuda/sm80/backward/launch.h"
#include "backward.h"
#include "call_cuda.h"

namespace gqa::host {
namespace {

Gradients backward(const Inputs& in, const CacheInputs* packed, const Results& results,
                   int64_t max_kv_len) {
  const int32_t index = in.q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const cuda::Device device = check_cuda_call(in, packed);
  check_results(in, results, check_cuda);
  auto [gradients, params] = add_gradients(params_of(in, packed), in, results, max_kv_len);
  const std::string reason = cuda::sm80::backward_unsupported(params);
  STD_TORCH_CHECK(reason.empty(), "no CUDA kernel can run this backward: ", reason);
  Tensor workspace =
      workspace_of(in.q, cuda::sm80::backward_workspace_bytes(params, device.num_sms));
  cuda::sm80::backward(params, workspace.mutable_data_ptr(), device.num_sms, current_stream(index));
  return gradients;
}

}  // namespace

Gradients attention_backward_cuda(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, double dropout_p,
    const OptionalTensor& dropout_seed, bool need_slopes, bool need_sinks) {
  return backward({q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths,
                   scale, window_left, window_right, softcap, dropout_p, dropout_seed},
                  nullptr, {dout, dlse, out, lse, need_slopes, need_sinks}, k.size(2));
}

Gradients packed_attention_backward_cuda(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const Tensor& kv_lengths, const Tensor& kv_begin,
    const Tensor& q_offsets, int64_t max_q_len, int64_t max_kv_len, double scale,
    int64_t window_left, int64_t window_right, double softcap, bool need_slopes, bool need_sinks) {
  STD_TORCH_CHECK(max_kv_len >= 0 && max_kv_len <= k.size(2),
                  "max_kv_len must be 0 to k.shape[2] (", k.size(2), "), got ", max_kv_len);
  const OptionalTensor none, lengths = kv_lengths, begin = kv_begin, offsets = q_offsets;
  const CacheInputs packed{none, begin, offsets, max_q_len, none, none, none, none};
  return backward({q, k, v, head_map, value_head_map, alibi_slopes, sinks, none, lengths, scale,
                   window_left, window_right, softcap, 0.0, none},
                  &packed, {dout, dlse, out, lse, need_slopes, need_sinks}, max_kv_len);
}

}  // namespace gqa::host
