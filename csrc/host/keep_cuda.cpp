#include <torch/csrc/stable/accelerator.h>

#include "../cuda/sm80/keep/launch.h"
#include "call_cuda.h"
#include "keep.h"

namespace gqa::host {

void cache_keep_cuda(const KeepInputs& in) {
  const int32_t index = in.k.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const KeptCache kept(in);
  const Inputs inputs = kept.inputs();
  const cuda::Device device = check_cuda_call(inputs);
  const KeepParams params = params_of(in, params_of(inputs), check_cuda);
  const std::string reason = cuda::sm80::keep_unsupported(params);
  STD_TORCH_CHECK(reason.empty(), "no CUDA kernel can run this keep: ", reason);
  cuda::sm80::keep(params, nullptr, device, current_stream(index));
}

}  // namespace gqa::host
