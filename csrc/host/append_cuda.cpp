#include <torch/csrc/stable/accelerator.h>

#include "../cuda/sm80/append/launch.h"
#include "append.h"
#include "call_cuda.h"

namespace gqa::host {

Tensor cache_append_cuda(const AppendInputs& in) {
  const int32_t index = in.k_new.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const AppendedCache appended(in);
  const Inputs inputs = appended.inputs();
  const cuda::Device device = check_cuda_call(inputs);
  AppendParams params = params_of(in, params_of(inputs), check_cuda);
  Tensor rotated = add_rotated(params, in);
  const std::string reason = cuda::sm80::append_unsupported(params);
  STD_TORCH_CHECK(reason.empty(), "no CUDA kernel can run this append: ", reason);
  cuda::sm80::append(params, nullptr, device, current_stream(index));
  return rotated;
}

}  // namespace gqa::host
