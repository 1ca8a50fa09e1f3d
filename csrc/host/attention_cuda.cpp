#include <torch/csrc/stable/accelerator.h>

#include "../cuda/attention.h"
#include "attention.h"
#include "call_cuda.h"

namespace gqa::host {

std::tuple<Tensor, Tensor> attention_forward_cuda(const Inputs& in, bool bshd) {
  const int32_t index = in.q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const cuda::Device device = check_cuda_call(in);
  AttentionParams params = params_of(in);
  const Tensor out = add_output(params, in.q, bshd), lse = add_lse(params, in.q);
  const cuda::Phase phase = cuda::choose_phase(params, device);
  Tensor workspace = workspace_of(in.q, cuda::workspace_bytes(params, phase, device));
  cuda::attention_forward(params, phase, workspace.mutable_data_ptr(), device,
                          current_stream(index));
  return {out, lse};
}

Tensor attention_output_cuda(const Inputs& in, bool bshd) {
  return std::get<0>(attention_forward_cuda(in, bshd));
}

}  // namespace gqa::host
