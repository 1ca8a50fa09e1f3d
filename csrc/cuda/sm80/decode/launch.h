// Attention of few query tokens over a tensor, a dense cache or pages, on sm_80 and later.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "../../../core/params.h"
#include "../../device.h"

namespace gqa::cuda::sm80 {

// As described in cuda/launch.h.
std::string decode_unsupported(const AttentionParams& params);
bool decode_supported(const AttentionParams& params);
size_t decode_workspace_bytes(const AttentionParams& params, const Device& device);
void decode(const AttentionParams& params, void* workspace, const Device& device,
            cudaStream_t stream);

}  // namespace gqa::cuda::sm80
