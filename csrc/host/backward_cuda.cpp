#include <torch/csrc/stable/accelerator.h>

#include "../cuda/sm80/backward/launch.h"
#include "backward.h"
#include "call_cuda.h"

namespace gqa::host {

Gradients attention_backward_cuda(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, double dropout_p,
    const OptionalTensor& dropout_seed, bool need_slopes, bool need_sinks) {
  const int32_t index = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Inputs in{q,       k,         v,           head_map, value_head_map, alibi_slopes,
                  sinks,   attn_mask, kv_lengths,  scale,    window_left,    window_right,
                  softcap, dropout_p, dropout_seed};
  const Results results{dout, dlse, out, lse, need_slopes, need_sinks};
  const cuda::Device device = check_cuda_call(in, nullptr);
  check_results(in, results, check_cuda);
  auto [gradients, params] = add_gradients(params_of(in, nullptr), in, results);
  const std::string reason = cuda::sm80::backward_unsupported(params);
  STD_TORCH_CHECK(reason.empty(), "no CUDA kernel can run this backward: ", reason);
  Tensor workspace = workspace_of(q, cuda::sm80::backward_workspace_bytes(params, device.num_sms));
  cuda::sm80::backward(params, workspace.mutable_data_ptr(), device.num_sms, current_stream(index));
  return gradients;
}

}  // namespace gqa::host
