// Moves the rows of the keys that a cache keeps to the front of their sequence, on sm_80 and later.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "../../../core/keep_params.h"
#include "../../device.h"

namespace gqa::cuda::sm80 {

// As described in cuda/launch.h, for KeepParams of any format. One launch and no workspace. If
// indices don't ascend, what the kept rows hold is undefined; nothing is accessed out of bounds.
std::string keep_unsupported(const KeepParams& params);
bool keep_supported(const KeepParams& params);
size_t keep_workspace_bytes(const KeepParams& params, const Device& device);
void keep(const KeepParams& params, void* workspace, const Device& device, cudaStream_t stream);

}  // namespace gqa::cuda::sm80
