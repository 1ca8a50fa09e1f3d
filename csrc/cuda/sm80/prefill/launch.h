// Attention of many query tokens over tensors, caches and packed sequences, on sm_80 and later.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "../../../core/params.h"
#include "../../device.h"

namespace gqa::cuda::sm80 {

// As described in cuda/launch.h.
std::string prefill_unsupported(const AttentionParams& params);
bool prefill_supported(const AttentionParams& params);
size_t prefill_workspace_bytes(const AttentionParams& params, const Device& device);
void prefill(const AttentionParams& params, void* workspace, const Device& device,
             cudaStream_t stream);

}  // namespace gqa::cuda::sm80
