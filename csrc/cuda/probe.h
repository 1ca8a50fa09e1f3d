#pragma once

#include "launch.h"

namespace gqa::cuda {

// Launches an empty kernel. Throws std::runtime_error with what the CUDA runtime says.
void launch_probe(cudaStream_t stream);

}  // namespace gqa::cuda
