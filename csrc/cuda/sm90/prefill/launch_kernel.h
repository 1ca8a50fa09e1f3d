// The entry of each instantiation of the kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "../../../core/params.h"

namespace gqa::cuda::sm90 {

// T: BFloat16 or Float16; kHeadDim: 64, 128 or 256. The parameters are supported and have tiles.
template <class T, int kHeadDim>
void launch_prefill(const AttentionParams& params, void* workspace, int num_sms,
                    cudaStream_t stream);

}  // namespace gqa::cuda::sm90
