// A call on a CUDA device: what forward and backward share there.
#pragma once

#include <cuda_runtime_api.h>

#include "../cuda/attention.h"
#include "inputs.h"

namespace gqa::host {

void check_cuda(const char* name, const Tensor& x, const Tensor& q);

// Checks the inputs without reading their values, and returns facts about the current device.
cuda::Device check_cuda_call(const Inputs& in);

// Torch's current stream of a device.
cudaStream_t current_stream(int32_t device);

// Memory from torch's allocator, which reuses it only after the current stream has passed.
Tensor workspace_of(const Tensor& q, size_t bytes);

}  // namespace gqa::host
