#pragma once

#include "launch.h"

namespace gqa::cuda {

// Launches an empty kernel. Throws std::runtime_error with the CUDA runtime's message.
void launch_probe(cudaStream_t stream);

}  // namespace gqa::cuda
