#include <torch/csrc/stable/accelerator.h>

#include "../cuda/sm80/backward/launch.h"
#include "backward.h"
#include "call_cuda.h"

namespace gqa::host {

Gradients attention_backward_cuda(const Inputs& in, const Results& results) {
  const int32_t index = in.q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const cuda::Device device = check_cuda_call(in);
  check_results(in, results, check_cuda);
  auto [gradients, params] = add_gradients(params_of(in), in, results);
  const std::string reason = cuda::sm80::backward_unsupported(params);
  STD_TORCH_CHECK(reason.empty(), "no CUDA kernel can run this backward: ", reason);
  Tensor workspace = workspace_of(in.q, cuda::sm80::backward_workspace_bytes(params, device));
  cuda::sm80::backward(params, workspace.mutable_data_ptr(), device, current_stream(index));
  return gradients;
}

}  // namespace gqa::host
