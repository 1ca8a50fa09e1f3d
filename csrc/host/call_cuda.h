// A call on a CUDA device: what forward and backward have in common there.
#pragma once

#include <cuda_runtime_api.h>

#include "../cuda/attention.h"
#include "inputs.h"

namespace gqa::host {

void check_cuda(const char* name, const Tensor& x, const Tensor& q);

// The current device's facts, after the checks of the inputs that need no look at their values.
cuda::Device check_cuda_call(const Inputs& in);

// Torch's current stream of a device.
cudaStream_t current_stream(int32_t device);

// Memory from torch's allocator, which keeps it until the current stream is past it.
Tensor workspace_of(const Tensor& q, size_t bytes);

}  // namespace gqa::host
