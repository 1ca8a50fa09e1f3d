// Gradients of attention over dense tensors and packed sequences, on sm_80 and later.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "../../../core/backward_params.h"
#include "../../device.h"

namespace gqa::cuda::sm80 {

// As described in cuda/launch.h, for BackwardParams. The workspace has two numbers per query row,
// padded to blocks of 32 tokens and, if slopes need gradients, a number for each block of query
// rows.
std::string backward_unsupported(const BackwardParams& params);
bool backward_supported(const BackwardParams& params);
size_t backward_workspace_bytes(const BackwardParams& params, const Device& device);
void backward(const BackwardParams& params, void* workspace, const Device& device,
              cudaStream_t stream);

}  // namespace gqa::cuda::sm80
