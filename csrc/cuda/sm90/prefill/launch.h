// Attention of many query tokens on Hopper. The common interface: cuda/launch.h.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../../../core/params.h"
#include "../../device.h"

namespace gqa::cuda::sm90 {

// Declines, beside what sm80's prefill declines: dropout, quantised keys, pages whose size is not a
// multiple of 8 or whose sequences do not begin at a page's start, more than 512 query heads, and
// tensors that TMA can't address (base and strides must be multiples of
// 16 bytes, and strides positive).
std::string prefill_unsupported(const AttentionParams& params);
bool prefill_supported(const AttentionParams& params);
size_t prefill_workspace_bytes(const AttentionParams& params, const Device& device);
void prefill(const AttentionParams& params, void* workspace, const Device& device,
             cudaStream_t stream);

}  // namespace gqa::cuda::sm90
