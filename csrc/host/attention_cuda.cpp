#include <torch/csrc/stable/accelerator.h>

#include "../cuda/attention.h"
#include "attention.h"
#include "call_cuda.h"

namespace gqa::host {

std::tuple<Tensor, Tensor> attention_forward_cuda(const Inputs& in, bool bshd, bool lse_wanted) {
  const int32_t index = in.q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const cuda::Device device = check_cuda_call(in);
  AttentionParams params = params_of(in);
  Outputs outputs = add_outputs(params, in.q, bshd, lse_wanted);
  Tensor scratch = outputs.lse;
  if (!lse_wanted) {
    scratch = workspace_of(in.q, sizeof(float) * in.q.size(0) * in.q.size(1) * in.q.size(2));
    params.lse = static_cast<float*>(scratch.mutable_data_ptr());
  }
  const cuda::Phase phase = cuda::choose_phase(params, device);
  Tensor workspace = workspace_of(in.q, cuda::workspace_bytes(params, phase, device));
  cuda::attention_forward(params, phase, workspace.mutable_data_ptr(), device,
                          current_stream(index));
  return {outputs.out, outputs.lse};
}

}  // namespace gqa::host
