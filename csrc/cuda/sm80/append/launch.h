// Appends new tokens to a cache, on sm_80 and later.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "../../../core/append_params.h"
#include "../../device.h"

namespace gqa::cuda::sm80 {

// As described in cuda/launch.h, for AppendParams of any types. One launch and no workspace. If new
// offsets don't ascend from 0, tokens are dropped; nothing is written out of bounds.
std::string append_unsupported(const AppendParams& params);
bool append_supported(const AppendParams& params);
size_t append_workspace_bytes(const AppendParams& params, const Device& device);
void append(const AppendParams& params, void* workspace, const Device& device, cudaStream_t stream);

}  // namespace gqa::cuda::sm80
