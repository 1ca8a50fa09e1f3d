// The largest D and Dv that the CPU kernels can run. 576 is the key of multi-head latent attention:
// 512 latent numbers and 64 with a rotary embedding.
#pragma once

#include <cstdint>

namespace gqa::cpu {

constexpr int64_t kMaxHeadDim = 576;

}  // namespace gqa::cpu
