// What the CPU kernels can run: the largest D and Dv. 576 is K of multi-head latent attention, 512
// numbers and 64 of rotary embedding.
#pragma once

#include <cstdint>

namespace gqa::cpu {

constexpr int64_t kMaxHeadDim = 576;

}  // namespace gqa::cpu
