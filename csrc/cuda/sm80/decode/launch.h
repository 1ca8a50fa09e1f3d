// Attention of few query tokens over a tensor, a dense cache or pages, on sm_80 and later.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "../../../core/params.h"

namespace gqa::cuda::sm80 {

// As described in cuda/launch.h.
std::string decode_unsupported(const AttentionParams& params);
bool decode_supported(const AttentionParams& params);
size_t decode_workspace_bytes(const AttentionParams& params, int num_sms);
void decode(const AttentionParams& params, void* workspace, int num_sms, cudaStream_t stream);

// The number of parts that the keys of a tile are cut into.
int decode_splits(const AttentionParams& params, int num_sms);

}  // namespace gqa::cuda::sm80
