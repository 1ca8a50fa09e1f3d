// Attention on the current CUDA device: chooses the phase of a call and runs it. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../core/params.h"
#include "device.h"

namespace gqa::cuda {

enum class Phase { kDecode, kPrefillSm80, kPrefillSm90 };

// The phase for a call, from shapes, strides and types only. Throws std::runtime_error with the
// reasons if no phase can run it.
Phase choose_phase(const AttentionParams& params, const Device& device);

size_t workspace_bytes(const AttentionParams& params, Phase phase, const Device& device);

// Writes out and LSE. The workspace: of that size, 256-byte aligned, any contents.
void attention_forward(const AttentionParams& params, Phase phase, void* workspace,
                       const Device& device, cudaStream_t stream);

}  // namespace gqa::cuda
